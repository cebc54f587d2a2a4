"""Training a model over a plan of steps, from the start or from where an earlier attempt got to."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora_lab.config.schema import OptimConfig, TrainerConfig
from qlora_lab.data.tokenization import Example
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.runs.lease import Lease
from qlora_lab.train.after_step import AfterStep, Record, SavePolicy
from qlora_lab.train.checkpoint import Checkpoint, Counters, TrainingState, load_newest
from qlora_lab.train.interrupt import CtrlC, TrainingInterrupted, as_usual_exceptions
from qlora_lab.train.loop import run_loop
from qlora_lab.train.module import TrainingModule
from qlora_lab.train.offload import OffloadedActivations
from qlora_lab.train.optimizer import build_optimizer, describe_optimizer
from qlora_lab.train.progress import NoProgress, Progress
from qlora_lab.train.schedule import count_warmup_steps, scale
from qlora_lab.train.steps import StepDataset, step_loader

__all__ = ["FitResult", "TrainingInterrupted", "fit"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """What training did, over all attempts of the run."""

    steps: int
    tokens: int  # input tokens, padding left out
    target_tokens: int
    time_s: float  # inside the training loop
    resumed_from: int | None  # the step this attempt started after; None: from the beginning
    optimizer: str  # which one, and what computes it

    @property
    def trained_now(self) -> bool:
        """Whether this attempt took a step."""
        return self.steps > (self.resumed_from or 0)


def fit(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: Sequence[Sequence[int]],
    *,
    optim: OptimConfig,
    trainer: TrainerConfig,
    pad_id: int,
    seed: int,
    checkpoints: Path,
    record: Record,
    lease: Lease | None = None,
    pack_tokens: int | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> FitResult:
    """Train the parameters of `model` that require gradients, on the device where the model is.

    Every `trainer.checkpoint_every_steps` steps, and after the last, a checkpoint is written. A later call
    with the same arguments goes on from the newest whole one and, on a CPU, ends with the same bits as a call
    that was never interrupted.

    Args:
        examples: the training rows.
        plan: row numbers of each optimizer step, for the whole run.
        optim: learning rate, schedule, AdamW and clipping.
        trainer: micro_batch_size (resolved), checkpoint_every_steps, keep_checkpoints, log_every_steps,
            loss_chunk_tokens, gradient_checkpointing and offload_activations are read.
        pad_id: the token that fills up short rows.
        seed: of the random generators that dropout draws from.
        checkpoints: folder of this run's checkpoints.
        record: called with the number of steps done and the metrics of the last, each named `train/...`;
            every `trainer.log_every_steps` steps, and for the first and the last.
        lease: of the run: training ends when a later attempt has taken it.
        pack_tokens: most tokens of several examples that share a row; None: each has a row of its own.
        forward_context: entered around each forward pass and its loss; a place to set the dtype of the products.
        stop: asked after each step; once true, training saves a checkpoint and ends.
        progress: shows how far training is.
        clock: seconds.

    Raises:
        TrainingInterrupted: `stop` said so, or the process got a SIGTERM.
        LeaseLostError: a later attempt has the run.
        KeyboardInterrupt: Ctrl-C was pressed; the step was finished and saved first, unless it came twice.
        TrainingError: loss, gradients or the weights to be saved are not finite.
        RunFolderError: a checkpoint cannot be written, or is of another run.
    """
    if not isinstance(trainer.micro_batch_size, int):
        raise ConfigError(f"trainer.micro_batch_size must be a number before training; got {trainer.micro_batch_size}")
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    state = TrainingState(parameters, build_optimizer(optim, parameters), Counters())
    checkpoint = _take_up(state, checkpoints, len(plan))
    counters = state.counters
    resumed_from = counters.step if checkpoint is not None else None
    if counters.step < len(plan):
        ctrl_c = CtrlC()
        after_step = AfterStep(
            state,
            rng=checkpoint.rng if checkpoint is not None else None,
            seed=seed,
            total_steps=len(plan),
            saving=SavePolicy(checkpoints, trainer.checkpoint_every_steps, trainer.keep_checkpoints, lease),
            record=record,
            log_every_steps=trainer.log_every_steps,
            stop=stop,
            ctrl_c=ctrl_c,
            progress=progress or NoProgress(),
            clock=clock,
        )
        around_forward = _with_offloading(model, forward_context) if trainer.offload_activations else forward_context
        module = _module(model, state, optim, len(plan), trainer.loss_chunk_tokens, around_forward, clock)
        steps = StepDataset(examples, plan, counters.step, trainer.micro_batch_size, pad_id, pack_tokens)
        with (
            ctrl_c.waiting_for_step(),
            _training_mode(model, trainer.gradient_checkpointing),
            as_usual_exceptions(ctrl_c),
            step_loader(steps, model.device) as batches,
        ):
            run_loop(module, batches, [after_step], model.device)
    state.check_finite()
    return FitResult(
        counters.step,
        counters.tokens,
        counters.target_tokens,
        counters.time_s,
        resumed_from,
        describe_optimizer(state.optimizer),
    )


def _take_up(state: TrainingState, checkpoints: Path, total_steps: int) -> Checkpoint | None:
    """Bring `state` to where an earlier attempt got to; return the checkpoint, None if there is none."""
    checkpoint = load_newest(checkpoints)
    if checkpoint is None:
        return None
    if checkpoint.counters.step > total_steps:
        raise RunFolderError(
            f"the checkpoint in {checkpoints} is of step {checkpoint.counters.step} and the plan has "
            f"{total_steps}; it is of another run: use a new run folder"
        )
    state.restore(checkpoint)
    return checkpoint


def _module(
    model: PreTrainedModel,
    state: TrainingState,
    optim: OptimConfig,
    total_steps: int,
    loss_chunk_tokens: int,
    forward_context: Callable[[], AbstractContextManager[Any]],
    clock: Callable[[], float],
) -> TrainingModule:
    warmup_steps = count_warmup_steps(total_steps, optim.warmup_share)

    def learning_rate(step: int) -> float:
        return optim.learning_rate * scale(step, total_steps, warmup_steps, optim.schedule)

    return TrainingModule(
        model,
        state,
        learning_rate=learning_rate,
        max_grad_norm=optim.max_grad_norm,
        loss_chunk_tokens=loss_chunk_tokens,
        forward_context=forward_context,
        clock=clock,
    )


def _with_offloading(
    model: PreTrainedModel, forward_context: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context of a forward pass in which activations go to the host; on a CPU they are there already."""
    if model.device.type != "cuda":
        logger.warning("trainer.offload_activations changes nothing: the model is not on a GPU")
        return forward_context
    offloaded = OffloadedActivations(model)

    @contextmanager
    def both() -> Iterator[None]:
        with forward_context(), offloaded:
            yield

    return both


@contextmanager
def _training_mode(model: PreTrainedModel, gradient_checkpointing: bool) -> Iterator[None]:
    """Train inside the block, with gradient checkpointing if asked; leave the model in evaluation mode."""
    model.train()
    with warnings.catch_warnings():
        # transformers 5.20 has the old name only, and 6.0 will have the new one only
        warnings.filterwarnings("ignore", message=r"`gradient_checkpointing_\w+` is deprecated")
        if gradient_checkpointing:
            # the re-entrant kind gives no gradient above a frozen embedding
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            if gradient_checkpointing:
                model.gradient_checkpointing_disable()
                model.disable_input_require_grads()  # a hook on the embedding that enabling left there
            model.eval()
