"""Runs of a W&B project, through W&B's public API.

One paged query brings the configurations and summaries of all runs. A curve costs several requests a run, so curves are
asked for one by one, and only of runs that have changed since they were kept.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from analysis.sources.wandb_runs import MirroredRun, records_of, steps_of
from qlora_lab.errors import ConfigError, RunFolderError

SCHEME = "wandb://"
PER_PAGE = 100
TIMEOUT_S = 30


@dataclass(frozen=True)
class OnlineRun:
    """A run of a project as the query found it."""

    address: str
    run: Any  # of W&B's API

    @property
    def stamp(self) -> str:
        """What changes when the run does; its configuration and summary can be edited without a sign of life."""
        told = json.dumps([self.run.config, dict(self.run.summary_metrics or {})], sort_keys=True, default=str)
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return f"{self.run.heartbeatAt} {self.run.state} {self.run.historyLineCount} {digest}"

    def read(self, with_history: bool) -> MirroredRun:
        """Return the run; without its steps where they are not wanted.

        Raises:
            RunFolderError: W&B cannot be reached.
        """
        records = records_of(self.run.id, dict(self.run.config), dict(self.run.summary_metrics or {}))
        steps = {}
        if with_history:
            with _in_words(self.address):
                lines = sorted(self.run.scan_history(page_size=10_000), key=lambda line: line.get("_step", 0))
            steps = steps_of(lines)
        return MirroredRun(self.run.id, self.address, records, steps)


def project_runs(source: str) -> dict[str, OnlineRun]:
    """Return the runs of `wandb://ENTITY/PROJECT` by their addresses.

    Raises:
        ConfigError: `source` names no project.
        RunFolderError: W&B cannot be reached, or has no such project.
    """
    path = source.removeprefix(SCHEME).strip("/")
    if path.count("/") != 1:
        raise ConfigError(f"a W&B project is given as wandb://ENTITY/PROJECT; got '{source}'")
    import wandb  # a second, and needed for this source alone

    with _in_words(source):
        found = list(wandb.Api(timeout=TIMEOUT_S).runs(path, per_page=PER_PAGE, lazy=False, order="+created_at"))
    return {f"{SCHEME}{path}/{run.id}": OnlineRun(f"{SCHEME}{path}/{run.id}", run) for run in found}


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
