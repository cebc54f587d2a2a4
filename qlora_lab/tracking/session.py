"""Mirror a run into W&B. The run folder is the truth: nothing here can fail a run, or block it for long.

Figures behind the settings: an offline `init` takes 0.25 s with W&B's defaults and 0.03 s with ours; online,
an unreachable server would hold `init` for 102 s and `finish` for minutes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from qlora_lab.config.schema import RunConfig, TrackingConfig
from qlora_lab.runs.mirror import STEP

TAG_LENGTH = 64  # W&B refuses longer ones


class Session(Protocol):
    def begin(self, summary: dict[str, Any]) -> None: ...
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def adapter(self, folder: Path) -> None: ...
    def finish(self, state: str, summary: dict[str, Any]) -> None: ...


class NoSession:
    """tracking=none."""

    def begin(self, summary: dict[str, Any]) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def adapter(self, folder: Path) -> None:
        pass

    def finish(self, state: str, summary: dict[str, Any]) -> None:
        pass


class WandbSession:
    """One W&B run, whose id is the run's id."""

    def __init__(self, run: Any, folder: Path) -> None:
        self._run = run
        self._folder = folder  # the run folder
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, summary="none")  # we write the summary: as it begins and ends

    def begin(self, summary: dict[str, Any]) -> None:
        """Say how the run stands before it trains: of one that is killed, this is the last word."""
        self._run.summary.update({"status": "running", **summary})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({STEP: step, **metrics})

    def adapter(self, folder: Path) -> None:
        """Log the adapter's files as an artifact of type `adapter`."""
        import wandb

        artifact = wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
        folder = folder.resolve()
        with _staging_in((self._folder / "wandb").resolve()):
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                # immutable: W&B takes the file from where it is; a copy of a whole model would be a big one
                artifact.add_file(str(file), name=str(file.relative_to(folder)), policy="immutable")
            self._run.log_artifact(artifact)

    def finish(self, state: str, summary: dict[str, Any]) -> None:
        self._run.summary.update({"status": state, **summary})
        if state == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)


class GuardedSession:
    """Passes everything on until the first error, which ends the tracking, in one line, and not the run.

    Here alone every Exception is caught: W&B, its service process and the network fail in ways that nobody can list,
    and nothing of a run depends on its mirror.
    """

    def __init__(self, open_it: Callable[[], Session]) -> None:
        self._session: Session = NoSession()
        self._guarded(lambda _: self._open(open_it))

    def begin(self, summary: dict[str, Any]) -> None:
        self._guarded(lambda session: session.begin(summary))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._guarded(lambda session: session.log(step, metrics))

    def adapter(self, folder: Path) -> None:
        self._guarded(lambda session: session.adapter(folder))

    def finish(self, state: str, summary: dict[str, Any]) -> None:
        self._guarded(lambda session: session.finish(state, summary))

    def _open(self, open_it: Callable[[], Session]) -> None:
        self._session = open_it()

    def _guarded(self, action: Callable[[Session], None]) -> None:
        try:
            action(self._session)
        except Exception as error:
            self._session = NoSession()
            print(f"tracking stopped ({_reason(error)}); the run goes on, and its folder has everything", flush=True)
            if isinstance(error, ConnectionError):
                _forget_service()


def open_session(config: RunConfig, run_id: str, group: str, folder: Path) -> Session:
    """Start tracking a run; an unreachable W&B server means offline files, said in one line.

    Whatever fails, now or later, fails the tracking and never the run.

    Args:
        config: of the run, resolved; all of it is recorded.
        run_id: also the W&B id, so that a resumed run stays the same W&B run.
        group: the study's name.
        folder: the run folder; W&B's files go into its `wandb/`.
    """
    if config.tracking.mode == "none":
        return NoSession()
    return GuardedSession(lambda: _open_wandb(config, run_id, group, folder))


def _open_wandb(config: RunConfig, run_id: str, group: str, folder: Path) -> WandbSession:
    # W&B's reports about itself; they hold a process up for 20 s at its end where the server takes them in silence.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    tracking = config.tracking
    tags = [*tracking.tags, config.model.name, config.quant.format, config.data.name]
    arguments: dict[str, Any] = {
        "project": tracking.project,
        "entity": tracking.entity,
        "id": run_id,
        "name": f"{config.model.name}-{config.quant.format}-{config.data.name}-s{config.seed}",
        "group": group,
        "job_type": "train",
        "tags": list(dict.fromkeys(tag[-TAG_LENGTH:] for tag in tags)),  # the end of a path tells more than its start
        "config": asdict(config),
        "dir": str(folder.resolve()),
        "settings": _settings(tracking),
    }
    if tracking.mode == "online":
        try:
            return WandbSession(wandb.init(mode="online", resume="allow", **arguments), folder)
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            print(f"W&B is not reachable ({_reason(error)}); tracking goes on offline: sync it later with `wandb sync`")
            wandb.teardown()  # its service still holds the run id of the failed attempt
    return WandbSession(wandb.init(mode="offline", **arguments), folder)


def _forget_service() -> None:
    """Let the next run of this process start another W&B service: the one there was has died."""
    import wandb

    # It says good-bye to the dead process, which raises; only a dead one is certain not to keep us waiting.
    with suppress(Exception, SystemExit):
        wandb.teardown()


@contextmanager
def _staging_in(folder: Path) -> Iterator[None]:
    """Let W&B stage artifacts in `folder` instead of ~/.local/share/wandb; it takes the place from the environment."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _settings(tracking: TrackingConfig) -> Any:
    """Return W&B's settings, leaving out names that the installed version does not know."""
    import wandb

    wanted: dict[str, Any] = {
        "console": "off",
        "silent": True,
        "disable_git": True,  # environment.json has the commit
        "disable_code": True,
        "symlink": False,  # to the logs of the latest of several runs: here each has a folder of its own
        "init_timeout": tracking.init_timeout_s,
        "finish_timeout": tracking.finish_timeout_s,
        "x_save_requirements": False,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
    }
    known = wandb.Settings.model_fields
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
