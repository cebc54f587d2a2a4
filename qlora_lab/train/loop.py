"""Lightning's training loop, with everything but the loop turned off."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

NOISY_LOGGERS = ("lightning.pytorch", "lightning.fabric")  # devices found, tips, "max_epochs=1 reached"
NOISY_WARNINGS = (
    r"The `srun` command is available",  # a run is one task: where there is a SLURM, submitit starts it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
)


def run_loop(
    module: LightningModule, batches: Iterable[Any], callbacks: Sequence[Callback], device: torch.device
) -> None:
    """Take each batch once, in order, on `device`.

    Records, checkpoints, progress and validation are no concern of Lightning's here: callbacks do that.
    """
    with _quiet():
        trainer = Trainer(
            accelerator=device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            plugins=[LightningEnvironment()],  # where it finds SLURM, Lightning would requeue the job by itself
            max_epochs=1,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, batches)


@contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in NOISY_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
