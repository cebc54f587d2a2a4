"""The plan as an immutable file: the resolved configuration of every run, named by the hash of what it holds.

Jobs run from it. It stands beside plan.json, as plan-HASH.json; another plan of the same runs, such as for another
launcher, is another file.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.runs.environment import git_commit
from qlora_lab.runs.files import write_atomic

FORMAT = 1
HASH_LENGTH = 12  # hex digits
GROUPS = [field.name for field in dataclasses.fields(RunConfig)]
PACKAGE = Path(__file__).resolve().parents[1]

# A run: its id, its place on the axes, its configuration.
Row = tuple[str, dict[str, str], RunConfig]


@dataclass(frozen=True)
class PlanFile:
    """What a plan's file holds.

    Attributes:
        study: its name.
        commit: of the code that planned, with `+changes` where files differed from it; None outside git.
        code_sha256: of the package's Python files.
    """

    study: str
    commit: str | None
    code_sha256: str
    rows: list[Row]


def write_plan_file(folder: Path, study: str, rows: Iterable[Row]) -> Path:
    """Write the file of a plan, unless it is there; each distinct group of values is written once.

    Returns:
        Its path, plan-HASH.json in `folder`.
    """
    content = _content(study, list(rows))
    path = folder / f"plan-{_hash(content)}.json"
    if not path.exists():
        write_atomic(path, content)
    return path


def read_plan_file(path: Path, run_ids: Iterable[str] | None = None) -> PlanFile:
    """Read a plan's file.

    Args:
        run_ids: the runs to read; None for all.

    Raises:
        RunFolderError: it is missing or was changed, lacks one of the runs, or was written by code too old to be read.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read ({error.strerror}); plan the study again") from error
    if path.name != f"plan-{_hash(content)}.json":
        raise RunFolderError(f"{path} is not what was planned: its content has another hash; plan the study again")
    record = json.loads(content)
    wanted = None if run_ids is None else set(run_ids)
    chosen = [row for row in record["runs"] if wanted is None or row[0] in wanted]
    if wanted is not None and len(chosen) < len(wanted):
        missing = sorted(wanted - {row[0] for row in chosen})
        raise RunFolderError(f"{path} plans no run {missing[0]}; plan the study again")
    try:
        rows = _rows(record, chosen)
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path} was planned with code that this one cannot read; plan the study again") from error
    return PlanFile(record["study"], record["code"]["commit"], record["code"]["sha256"], rows)


def _rows(record: dict[str, Any], chosen: list[Any]) -> list[Row]:
    built: dict[tuple[str, int], Any] = {}
    rows = []
    for run_id, places, indices in chosen:
        fields = {}
        for group, index in zip(record["groups"], indices, strict=True):
            if (group, index) not in built:
                built[group, index] = _build(_hints(RunConfig)[group], record["groups"][group][index])
            fields[group] = built[group, index]
        rows.append((run_id, dict(zip(record["axes"], places, strict=True)), RunConfig(**fields)))
    return rows


def check_code(planned: PlanFile) -> None:
    """Refuse to execute a plan with other code than it was planned with.

    The check is of the files' hash, which is stricter than the commit where it matters and milder where it does not: it
    tells two states of the same uncommitted work apart, works for an installed package, and lets a commit pass that
    changes only tests or words elsewhere. The commits are named, since they are what can be checked out.

    Raises:
        ConfigError: a Python file of the package has changed since.
    """
    if planned.code_sha256 != code_sha256():
        raise ConfigError(
            f"the code of qlora_lab has changed since study {planned.study} was planned (at commit "
            f"{planned.commit or 'unknown'}, now {code_commit() or 'unknown'}); plan it again with the same "
            "command, or check out what it was planned with"
        )


@cache
def code_commit() -> str | None:
    """Return the commit of this package, as `git_commit` does."""
    return git_commit(PACKAGE)


@cache
def code_sha256() -> str:
    """Return the hash of this package's Python files and their names."""
    return hash_of_code(PACKAGE)


def hash_of_code(folder: Path) -> str:
    """Return the hash of the Python files below a folder, and of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _content(study: str, rows: list[Row]) -> str:
    """Return the text of a plan's file: a line for each group of values, and one for each run."""
    groups: dict[str, dict[str, int]] = {group: {} for group in GROUPS}
    seen: dict[tuple[str, int], int] = {}  # by the id() of a group's object: runs share them
    runs = []
    for run_id, places, config in rows:
        indices = []
        for group in GROUPS:
            value = getattr(config, group)
            key = group, id(value)
            if key not in seen:
                plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
                texts = groups[group]
                seen[key] = texts.setdefault(json.dumps(plain, ensure_ascii=False), len(texts))
            indices.append(seen[key])
        runs.append(json.dumps([run_id, list(places.values()), indices], ensure_ascii=False))
    axes = list(rows[0][1]) if rows else []
    head = {"format": FORMAT, "study": study, "code": {"commit": code_commit(), "sha256": code_sha256()}}
    lines = ",\n".join(f'"{group}": [\n{_joined(texts)}\n]' for group, texts in groups.items())
    return (
        f'{json.dumps(head, ensure_ascii=False)[:-1]},\n"axes": {json.dumps(axes, ensure_ascii=False)},\n'
        f'"groups": {{\n{lines}\n}},\n"runs": [\n{_joined(runs)}\n]}}\n'
    )


def _joined(texts: Iterable[str]) -> str:
    return ",\n".join(texts)


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:HASH_LENGTH]


@cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _build(hint: Any, value: Any) -> Any:
    """Make typed values of what `asdict` made plain; they were checked before they were written.

    A key that the schema has got since has its default: code that changed shows what was planned, and executes none.
    """
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if value is None:
        return None
    if is_dataclass(hint) and isinstance(hint, type):
        hints = _hints(hint)
        return hint(**{name: _build(hints[name], item) for name, item in value.items()})
    if typing.get_origin(hint) is dict and is_dataclass(typing.get_args(hint)[1]):
        return {name: _build(typing.get_args(hint)[1], item) for name, item in value.items()}
    return value
