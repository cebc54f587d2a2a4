"""Mirror a run into W&B. The run folder is the truth: nothing here can block or fail a run for long.

Figures behind the settings: an offline `init` takes 0.25 s with W&B's defaults and 0.03 s with ours; online,
an unreachable server would hold `init` for 102 s and `finish` for minutes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from qlora_lab.config.schema import RunConfig, TrackingConfig

STEP = "trainer/global_step"  # fragments of a resumed run merge on it: offline, W&B's own step starts at 0 again


class Session(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def adapter(self, folder: Path) -> None: ...
    def finish(self, state: str, summary: dict[str, Any]) -> None: ...


class NoSession:
    """tracking=none."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def adapter(self, folder: Path) -> None:
        pass

    def finish(self, state: str, summary: dict[str, Any]) -> None:
        pass


class WandbSession:
    """One W&B run, whose id is the run's id."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, summary="none")  # we write the summary once, at the end

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({STEP: step, **metrics})

    def adapter(self, folder: Path) -> None:
        """Log the adapter's files as an artifact of type `adapter`."""
        import wandb

        artifact = wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def finish(self, state: str, summary: dict[str, Any]) -> None:
        self._run.summary.update({"status": state, **summary})
        if state == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)


def open_session(config: RunConfig, run_id: str, group: str, folder: Path) -> Session:
    """Start tracking a run; an unreachable W&B server means offline files, said in one line.

    Args:
        config: of the run, resolved; all of it is recorded.
        run_id: also the W&B id, so that a resumed run stays the same W&B run.
        group: the study's name.
        folder: the run folder; W&B's files go into its `wandb/`.
    """
    tracking = config.tracking
    if tracking.mode == "none":
        return NoSession()
    import wandb

    arguments: dict[str, Any] = {
        "project": tracking.project,
        "entity": tracking.entity,
        "id": run_id,
        "name": f"{config.model.name}-{config.quant.format}-{config.data.name}-s{config.seed}",
        "group": group,
        "job_type": "train",
        "tags": [*tracking.tags, config.model.name, config.quant.format, config.data.name],
        "config": asdict(config),
        "dir": str(folder),
        "settings": _settings(tracking),
    }
    if tracking.mode == "online":
        try:
            return WandbSession(wandb.init(mode="online", resume="allow", **arguments))
        except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"W&B is not reachable ({reason}); tracking goes on offline: sync it later with `wandb sync`")
            wandb.teardown()  # its service still holds the run id of the failed attempt
    return WandbSession(wandb.init(mode="offline", **arguments))


def _settings(tracking: TrackingConfig) -> Any:
    """Return W&B's settings, leaving out names that the installed version does not know."""
    import wandb

    wanted: dict[str, Any] = {
        "console": "off",
        "silent": True,
        "disable_git": True,  # environment.json has the commit
        "disable_code": True,
        "init_timeout": tracking.init_timeout_s,
        "finish_timeout": tracking.finish_timeout_s,
        "x_save_requirements": False,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
    }
    known = wandb.Settings.model_fields
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
