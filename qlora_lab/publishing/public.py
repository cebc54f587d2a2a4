"""What may be published: values without the folders, hosts and secrets of the machine they come from."""

import mmap
import os
import re
import shlex
import socket
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import RatingsWarning

ABSOLUTE_PATH = re.compile(r"(?:(?<![\w./])|(?<=file://))~?/(?!/)(?:[^/\s'\",=:]+/)+([^/\s'\",=:]+)")
PRIVATE_FIELD = re.compile(
    r"(?:^|_)(token|api_?key|key|secret|password|authorization|cookie|host|hostname|user|email|ip)$", re.IGNORECASE
)
NO_SECRETS = ("pad_token", "eos_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
PATH_FIELD = re.compile(r"(?:^|[_.])(?:path|dir|folder)$")  # of a setting that is a path, also without a root
ROOTED = re.compile(r"(?:~?/|\.{1,2}/)(?!/)")  # what a whole value begins with that is a path
SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)", re.IGNORECASE)
BINARY = (".safetensors", ".parquet", ".bin")  # in which short words stand by chance
NEWLINE = b"\n"
SHORTEST = 6  # characters: shorter names are ordinary words too, such as root, and shorter secrets are none


def public(value: Any, paths: Collection[str] = ()) -> Any:
    """Return plain values with paths cut to their last name, and without fields that name a secret or host.

    In prose, a path is told by its root and ends at the first blank; others must be given.

    Args:
        paths: known ones, as `paths_in` finds them in settings; they are cut wherever they stand.
    """
    if isinstance(value, dict):
        return {
            name: _last_name(item) if _is_path(str(name), item) else public(item, paths)
            for name, item in value.items()
            if name in NO_SECRETS or not PRIVATE_FIELD.search(str(name))
        }
    if isinstance(value, list | tuple):
        return [public(item, paths) for item in value]
    if not isinstance(value, str):
        return value
    for path in sorted(paths, key=len, reverse=True):
        last = _last_name(path).replace("\\", r"\\")
        value = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", last, value)
    return ABSOLUTE_PATH.sub(r"\1", value)


def paths_in(value: Any, name: str = "") -> set[str]:
    """Return the paths among settings: with a root, or by the names of their fields."""
    if isinstance(value, dict):
        return {path for key, item in value.items() for path in paths_in(item, str(key))}
    if isinstance(value, list | tuple):
        return {path for item in value for path in paths_in(item, name)}
    return {value} if _is_path(name, value) else set()


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Return a command as it was given, with every path in it cut to its last name."""
    told = []
    for word in arguments:
        key, equals, value = word.rpartition("=")
        told.append(f"{key}{equals}{_last_name(value)}" if "/" in value else word)
    return f"python -m {program} {shlex.join(told)}"


def _is_path(name: str, value: Any) -> bool:
    if not isinstance(value, str) or "/" not in value:
        return False
    return bool(ROOTED.match(value) or PATH_FIELD.search(name)) and "://" not in value


def _last_name(path: str) -> str:
    return Path(path).name


def refuse_private(folder: Path, paths: Collection[str] = ()) -> None:
    """Refuse a folder in which a file has this machine's name, its user's name or home, or a secret of the environment.

    Args:
        paths: of this machine, which must not be in it either.

    A name that is short enough to be an ordinary word is looked for as a whole word, and a RatingsWarning says where.

    Raises:
        DataError: names file, line and kind, never the secret.
    """
    private = dict.fromkeys(paths, "a path of this machine") | dict(_private())
    words = {text: re.compile(rf"(?<!\w){re.escape(text)}(?!\w)".encode()) for text in private if len(text) < SHORTEST}
    places: dict[str, list[str]] = {text: [] for text in words}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or not file.stat().st_size:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for text, kind in private.items():
                if text in words:
                    if file.suffix not in BINARY:
                        places[text] += [
                            _place(folder, file, content, m.start()) for m in words[text].finditer(content)
                        ]
                elif (found := content.find(text.encode())) >= 0:
                    place = _place(folder, file, content, found)
                    raise DataError(f"{place} would publish {kind}; take it out of the source")
    for text, found_at in places.items():
        if found_at:
            warnings.warn(
                f"'{text}', which is {private[text]}, stands in {len(found_at)} places, first in {found_at[0]}; it may "
                "be an ordinary word there: look before you publish",
                RatingsWarning,
                stacklevel=2,
            )


def _place(folder: Path, file: Path, content: mmap.mmap, start: int) -> str:
    return f"{file.relative_to(folder)}, line {content[:start].count(NEWLINE) + 1}"


def slug(name: str) -> str:
    """Return a name that can be a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"


def _private() -> Iterator[tuple[str, str]]:
    """Yield what must not be published, and what it is."""
    names = [(socket.gethostname(), "the name of this machine"), (str(Path.home()), "its user's home")]
    names += [(os.environ.get(variable, ""), "the name of its user") for variable in ("USER", "LOGNAME")]
    secrets = [(value, f"the secret in ${name}") for name, value in os.environ.items() if SECRET_VARIABLE.search(name)]
    yield from ((text, kind) for text, kind in names if len(text) > 1 and text != "localhost")
    yield from ((text, kind) for text, kind in secrets if len(text) >= SHORTEST)
