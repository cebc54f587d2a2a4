"""Runs of a W&B project, through W&B's public API.

A light listing, paged, says which runs there are and when each gave its last sign of life. Only of runs that have
changed since they were kept are configurations and summaries asked for, many in one query, and curves, several requests
a run.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from analysis.sources.run_row import Records
from analysis.sources.wandb_runs import MirroredRun, records_of, steps_of
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.sweep.listing import listed

SCHEME = "wandb://"
PER_PAGE = 100
TIMEOUT_S = 30


@dataclass(frozen=True)
class OnlineRun:
    """A run of a project as the listing found it."""

    address: str
    run: Any  # of W&B's API

    @property
    def stamp(self) -> str:
        """What changes when the run does. W&B need not count it as a sign of life when somebody edits a run later."""
        return f"{self.run.heartbeatAt} {self.run.state} {self.run.historyLineCount}"

    @property
    def project(self) -> str:
        return self.address.rpartition("/")[0]


def project_of(source: str) -> tuple[str, str]:
    """Return entity and project of `wandb://ENTITY/PROJECT`, or of a run in it, `wandb://ENTITY/PROJECT/RUN_ID`.

    Raises:
        ConfigError: `source` names no project.
    """
    match source.removeprefix(SCHEME).strip("/").split("/"):
        case [str(entity), str(project), *rest] if entity and project and len(rest) < 2:
            return entity, project
    raise ConfigError(f"a W&B project is given as wandb://ENTITY/PROJECT; got '{source}'")


def project_runs(sources: Iterable[str]) -> dict[str, OnlineRun]:
    """Return the runs of projects, and single runs, by their addresses; a project is asked once.

    Raises:
        ConfigError: a source names no project.
        RunFolderError: W&B cannot be reached, or has no such project or run.
    """
    wanted: dict[str, set[str]] = {}  # ids by project, an empty one for all of its runs
    for source in sources:
        place = SCHEME + "/".join(project_of(source))
        wanted.setdefault(place, set()).add(source.removeprefix(place).strip("/"))
    found: dict[str, OnlineRun] = {}
    for place, ids in wanted.items():
        some: dict[str, Any] = {} if "" in ids else {"filters": {"name": {"$in": sorted(ids)}}}
        runs = _asked(place, lazy=True, order="+created_at", **some)
        if some and (gone := sorted(ids - {run.id for run in runs})):
            raise RunFolderError(f"{place} has no run {', '.join(listed(gone))}; was it deleted, or never synced?")
        found |= {f"{place}/{run.id}": OnlineRun(f"{place}/{run.id}", run) for run in runs}
    return found


def read_rows(runs: Sequence[OnlineRun]) -> dict[str, MirroredRun]:
    """Read configurations and summaries of runs, without their curves, by address.

    Raises:
        RunFolderError: W&B cannot be reached, or a run was deleted meanwhile.
    """
    read = {}
    for project in dict.fromkeys(run.project for run in runs):
        ids = [run.run.id for run in runs if run.project == project]
        for first in range(0, len(ids), PER_PAGE):
            some = ids[first : first + PER_PAGE]
            found = {run.id: run for run in _asked(project, lazy=False, filters={"name": {"$in": some}})}
            if gone := [run_id for run_id in some if run_id not in found]:
                names = ", ".join(listed(gone))
                raise RunFolderError(f"{project} no longer has {names}, deleted while it was read; read it again")
            for run_id in some:
                records = records_of(run_id, dict(found[run_id].config), dict(found[run_id].summary_metrics or {}))
                address = f"{project}/{run_id}"
                read[address] = MirroredRun(run_id, address, records)
    return read


def read_curves(runs: Sequence[OnlineRun]) -> dict[str, MirroredRun]:
    """Read the curves of runs, without the rest, by address.

    Raises:
        RunFolderError: W&B cannot be reached.
    """
    read = {}
    for run in runs:
        with _in_words(run.address):
            # By time: attempts that were synced one by one may each count W&B's own step from 0.
            lines = sorted(
                run.run.scan_history(page_size=10_000),
                key=lambda line: (line.get("_timestamp", 0), line.get("_step", 0)),
            )
        read[run.address] = MirroredRun(run.run.id, run.address, Records(), steps_of(lines))
    return read


def _asked(project: str, **query: Any) -> list[Any]:
    import wandb  # a second, and needed for this source alone

    with _in_words(project):
        api = wandb.Api(timeout=TIMEOUT_S)
        return list(api.runs(project.removeprefix(SCHEME), per_page=PER_PAGE, **query))


@contextmanager
def _in_words(source: str) -> Iterator[None]:
    """Turn whatever W&B raises where it cannot be asked into one sentence."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, wandb.sdk.lib.service.service_connection.WandbApiFailedError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFolderError(
            f"{source} cannot be read from W&B ({reason}); check the name, WANDB_API_KEY and the network, or give the "
            "run folders, which have everything"
        ) from error
