"""Upload offline W&B runs: python -m qlora_lab.sync [FOLDER]

`wandb sync` does the work, several runs at a time. Here the runs of a study are found and sent in batches, so that
stopping loses no more than one of them: what W&B has is marked beside its file, and the same command goes on.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from qlora_lab.config.exit_status import FAILED, REFUSED
from qlora_lab.errors import LaunchError, QloraLabError, RunFolderError
from qlora_lab.runs.folder import RUNNING, RunFolder

EMPTY_BYTES = 7  # a file with its header only: the run was killed before W&B wrote anything
MINUTES = 60


@dataclass
class Found:
    """Files of offline runs, and those that are left alone, by the reason."""

    files: list[Path] = field(default_factory=list)
    synced: int = 0
    empty: int = 0
    running: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say what was found, in one line."""
        parts = [f"{len(self.files)} to upload", f"{self.synced} uploaded already"]
        if self.empty:
            parts.append(f"{self.empty} empty, of runs killed in their first seconds")
        if self.running:
            parts.append(f"{len(self.running)} still running ({', '.join(self.running[:3])})")
        return f"{len(self.files) + self.synced + self.empty + len(self.running)} W&B files: {', '.join(parts)}"


def find(folder: Path, *, include_online: bool = False) -> Found:
    """Return the offline W&B files below a folder of runs, a run's folder, or a `wandb` folder; one run's are in a row.

    Args:
        include_online: also those of runs that were online; what the server has already it does not take twice.

    Raises:
        RunFolderError: there is no such folder, or no W&B file in it.
    """
    files: list[Path] = []
    folder = folder.resolve()  # of `.` too, files have a run folder above them
    for place in ("*/wandb/", "wandb/", ""):
        for name in ("offline-run-*", *(["run-*-*"] if include_online else [])):
            files += folder.glob(f"{place}{name}/run-*.wandb")
    if not files:
        raise RunFolderError(
            f"no offline W&B run in {folder}; give the folder that holds the run folders (paths.runs_dir), or a "
            "wandb folder; tracking=wandb_offline writes them"
        )
    found = Found()
    # by the time in the folder's name, whether the attempt was online or not
    for file in sorted(files, key=lambda file: (file.name, file.parent.name.removeprefix("offline-"))):
        owner = file.parents[2]  # a run folder, where this is the mirror of one
        if file.with_name(f"{file.name}.synced").exists():
            found.synced += 1
        elif file.stat().st_size <= EMPTY_BYTES:
            found.empty += 1
        elif (owner / "status.json").exists() and RunFolder(owner).state() == RUNNING:
            found.running.append(owner.name)
        else:
            found.files.append(file)
    return found


def batches(files: Sequence[Path], size: int) -> list[list[Path]]:
    """Cut files into batches of about `size`; files of one run, which W&B must get in their order, stay together."""
    cut: list[list[Path]] = []
    for file in files:
        if not cut or (len(cut[-1]) >= size and cut[-1][-1].name != file.name):
            cut.append([])
        cut[-1].append(file)
    return cut


def upload(files: Sequence[Path], parallel: int, limit_s: float) -> str:
    """Give files to `wandb sync`, and return the last thing it said."""
    # `find` has chosen which runs; of those that were online `wandb sync` would take none without the option.
    options = ["--yes", "--include-online", "-n", str(parallel)]
    command = [sys.executable, "-m", "wandb", "sync", *options, *map(str, files)]
    with tempfile.TemporaryDirectory() as logs:  # it leaves a folder of logs wherever it runs
        own = {**os.environ, "WANDB_DIR": logs}
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s, env=own)
        except subprocess.TimeoutExpired:
            return f"it did not end in {limit_s / MINUTES:g} minutes"
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return said[-1].removeprefix("wandb: ") if said else f"exit status {done.returncode}"


def sync(
    folder: Path, *, parallel: int, batch: int, pause_s: float, limit_s: float, include_online: bool = False
) -> None:
    """Upload what is not uploaded yet, with a progress bar.

    Raises:
        RunFolderError: there is nothing to upload from.
        LaunchError: W&B took nothing of a batch; what it took before is marked.
    """
    found = find(folder, include_online=include_online)
    print(found.summary(), flush=True)
    left: list[Path] = []
    with tqdm(total=len(found.files), unit="file", disable=None) as bar:
        for number, files in enumerate(batches(found.files, batch)):
            time.sleep(pause_s if number else 0.0)
            said = upload(files, parallel, limit_s)
            missing = [file for file in files if not file.with_name(f"{file.name}.synced").exists()]
            bar.update(len(files) - len(missing))
            left += missing
            if len(missing) == len(files):
                raise LaunchError(
                    f"W&B took none of {len(files)} runs ({said}); check WANDB_API_KEY, WANDB_BASE_URL and the "
                    "network; what is uploaded stays so, and the same command goes on"
                )
    if left:
        raise LaunchError(
            f"{len(left)} of {len(found.files)} W&B files were not taken, such as {left[0]}; the same command tries "
            "them again"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.sync", description="Upload offline W&B runs.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--parallel", type=int, default=8, help="runs at a time; default: %(default)s")
    parser.add_argument("--batch", type=int, default=100, help="runs a call of `wandb sync`; default: %(default)s")
    parser.add_argument(
        "--pause-s", type=float, default=0.0, help="seconds between batches, where W&B limits the rate; default: 0"
    )
    parser.add_argument("--limit-min", type=float, default=30.0, help="minutes for a batch; default: %(default)g")
    parser.add_argument(
        "--include-online", action="store_true", help="also runs that were online, some of whose data W&B may not have"
    )
    parser.add_argument("--plan", action="store_true", help="say what would be uploaded, and upload nothing")
    options = parser.parse_args(arguments)
    try:
        if options.plan:
            print(find(options.folder, include_online=options.include_online).summary())
            return
        sync(
            options.folder,
            parallel=options.parallel,
            batch=options.batch,
            pause_s=options.pause_s,
            limit_s=options.limit_min * MINUTES,
            include_online=options.include_online,
        )
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED if isinstance(error, LaunchError) else REFUSED)


if __name__ == "__main__":
    main()
