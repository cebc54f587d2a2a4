"""What may be published: values without the folders, hosts and secrets of the machine they come from."""

import mmap
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_lab.errors import DataError

ABSOLUTE_PATH = re.compile(r"(?:(?<![\w./])|(?<=file://))~?/(?!/)(?:[^/\s'\",=:]+/)+([^/\s'\",=:]+)")
PRIVATE_FIELD = re.compile(
    r"(?:^|_)(token|api_?key|key|secret|password|authorization|cookie|host|hostname|user|email|ip)$", re.IGNORECASE
)
SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)", re.IGNORECASE)
SHORTEST = 6  # characters: names and secrets that are shorter stand in ordinary text as well


def public(value: Any) -> Any:
    """Return plain values with absolute paths cut to their last name, and without fields that name a secret or host."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items() if not PRIVATE_FIELD.search(str(name))}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return ABSOLUTE_PATH.sub(r"\1", value) if isinstance(value, str) else value


def refuse_private(folder: Path) -> None:
    """Refuse a folder in which a file has this machine's name, its user's name or home, or a secret of the environment.

    Raises:
        DataError: names file, line and kind, never the secret.
    """
    private = dict(_private())
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or not file.stat().st_size:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for text, kind in private.items():
                place = content.find(text.encode())
                if place >= 0:
                    line = content[:place].count(b"\n") + 1
                    raise DataError(
                        f"{file.relative_to(folder)}, line {line} would publish {kind}; take it out of the source"
                    )


def slug(name: str) -> str:
    """Return a name that can be a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def _private() -> Iterator[tuple[str, str]]:
    """Yield what must not be published, and what it is."""
    found = [(socket.gethostname(), "the name of this machine"), (os.environ.get("USER", ""), "the name of its user")]
    found.append((str(Path.home()), "its user's home"))
    found += [(value, f"the secret in ${name}") for name, value in os.environ.items() if SECRET_VARIABLE.search(name)]
    for text, kind in found:
        if len(text) >= SHORTEST and text != "localhost":
            yield text, kind
