"""The Lightning callback around the steps: random state, records, checkpoints, stopping."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qlora_lab.runs.lease import Lease
from qlora_lab.train.checkpoint import TrainingState, save_checkpoint
from qlora_lab.train.interrupt import CtrlC, TrainingInterrupted
from qlora_lab.train.module import TrainingModule
from qlora_lab.train.progress import Progress
from qlora_lab.train.rng import RngState, capture_rng, restore_rng, seed_everything

Record = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class SavePolicy:
    folder: Path
    every_steps: int
    keep: int
    lease: Lease | None = None  # of the run


class AfterStep(Callback):
    """Does after each step what training owes to the rest of the run.

    Args:
        rng: states to start from, of the checkpoint; None starts from `seed`.
        total_steps: of the whole run.
        log_every_steps: how often `record` gets the metrics; the first and the last step's always.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        rng: RngState | None,
        seed: int,
        total_steps: int,
        saving: SavePolicy,
        record: Record,
        log_every_steps: int,
        stop: Callable[[], bool],
        ctrl_c: CtrlC,
        progress: Progress,
        clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._rng = rng
        self._seed = seed
        self._total_steps = total_steps
        self._first_step = state.counters.step + 1
        self._saving = saving
        self._record = record
        self._log_every_steps = log_every_steps
        self._stop = stop
        self._ctrl_c = ctrl_c
        self._progress = progress
        self._clock = clock
        self._counted_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not earlier: what Lightning does before may draw random numbers
        if self._rng is None:
            seed_everything(self._seed)
        else:
            restore_rng(self._rng)
        self._counted_s = self._clock()
        self._progress.start(self._total_steps, self._state.counters.step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        counters = self._state.counters
        now = self._clock()
        counters.time_s += now - self._counted_s
        if self._saving.lease is not None:
            self._saving.lease.check()
        self._counted_s = now
        last = counters.step == self._total_steps
        if last or counters.step == self._first_step or counters.step % self._log_every_steps == 0:
            self._record(counters.step, pl_module.metrics)
        self._progress.update(counters.step, pl_module.metrics)
        stopping = self._ctrl_c.pressed or self._stop() or trainer.received_sigterm
        if last or stopping or counters.step % self._saving.every_steps == 0:
            self._state.check_finite()
            saving = self._saving
            save_checkpoint(saving.folder, self._state, capture_rng(), saving.keep, saving.lease)
        if stopping:
            raise TrainingInterrupted(
                f"training was asked to stop and did after step {counters.step} of {self._total_steps}, "
                "which is saved; start the run again to go on"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._progress.close()
