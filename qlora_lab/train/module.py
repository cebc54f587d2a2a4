"""The LightningModule of training: it connects model, loss, schedule and optimizer, and owns none of them."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from qlora_lab.errors import TrainingError
from qlora_lab.models.cross_entropy import GroupedLoss
from qlora_lab.models.loss import target_loss
from qlora_lab.train.checkpoint import TrainingState
from qlora_lab.train.steps import BUCKETS, StepBatch, bucket_name

logger = logging.getLogger(__name__)


class TrainingModule(LightningModule):
    """Takes one optimizer step per batch.

    The gradient of a step is that of the mean loss over all its target tokens, however they are spread over
    the micro-batches: their summed losses are accumulated, and the sum is divided once. (Summing first also
    keeps the small gradients of float16 away from zero.)

    The model is no submodule on purpose: Lightning moves its submodules to the CPU when it is done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        state: TrainingState,
        *,
        learning_rate: Callable[[int], float],
        max_grad_norm: float,
        loss_chunk_tokens: int,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.metrics: dict[str, float] = {}  # of the last step
        self._model = (model,)
        self._state = state
        self._learning_rate = learning_rate
        self._max_grad_norm = max_grad_norm
        self._loss_chunk_tokens = loss_chunk_tokens
        self._forward_context = forward_context
        self._clock = clock
        self._checked_gradients = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._state.optimizer

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Take one optimizer step and leave its metrics in `metrics`.

        Raises:
            TrainingError: the loss or a gradient is not finite; weights and optimizer are untouched.
        """
        started_s = self._clock()
        counters = self._state.counters
        step = counters.step + 1
        optimizer: Any = self.optimizers()
        rate = self._learning_rate(step - 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_sum, bucket_sums = self._accumulate(batch, step)
        loss, grad_norm = self._measure(loss_sum, batch.target_tokens, step)
        # from summed to mean gradients of a bounded norm; the 1e-6 is that of torch.nn.utils.clip_grad_norm_
        clipping = min(1.0, self._max_grad_norm / (grad_norm + 1e-6))
        optimizer.step(gradient_scale=clipping / batch.target_tokens)
        optimizer.zero_grad()
        counters.step = step
        counters.tokens += batch.tokens
        counters.target_tokens += batch.target_tokens
        step_time_s = self._clock() - started_s
        self.metrics = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/learning_rate": rate,
            "train/tokens": counters.tokens,
            "train/target_tokens": counters.target_tokens,
            "train/step_time_s": step_time_s,
            "train/tokens_per_s": batch.tokens / step_time_s,
            **loss_by_length(bucket_sums.tolist(), batch.bucket_target_tokens),
        }

    def _accumulate(self, batch: StepBatch, step: int) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the summed loss; return the sum (0-d, nats), and those of the length buckets."""
        if batch.target_tokens == 0:
            raise TrainingError(f"step {step} has no target token to train on; raise data.max_target_tokens")
        (model,) = self._model
        losses = []
        bucket_sums = torch.zeros(BUCKETS, device=model.device)
        for micro_batch, buckets in zip(batch.micro_batches, batch.buckets, strict=True):
            grouped = GroupedLoss(buckets, bucket_sums)
            with self._forward_context():
                loss, _ = target_loss(model, micro_batch, self._loss_chunk_tokens, grouped)
            if not loss.requires_grad:
                raise TrainingError(
                    "no gradient can reach the trainable parameters: the loss does not depend on any of "
                    f"the {len(self._state.parameters)} that are to be trained"
                )
            self.manual_backward(loss)
            losses.append(loss.detach())
            del loss  # and what it worked out, before the next forward pass
        if not self._checked_gradients:
            self._check_gradients()
        return torch.stack(losses).sum(), bucket_sums

    def _check_gradients(self) -> None:
        """Say once if the first step leaves parameters alone: experts may rest, adapters in the way may not."""
        self._checked_gradients = True
        parameters = self._state.parameters
        untouched = [name for name, parameter in parameters.items() if parameter.grad is None]
        if untouched:
            logger.warning(
                "no gradient reached %d of %d trainable parameters in the first step, such as %s",
                len(untouched),
                len(parameters),
                untouched[0],
            )

    def _measure(self, loss_sum: Tensor, target_tokens: int, step: int) -> tuple[float, float]:
        """Return (mean loss, norm of the mean gradients), checked before the optimizer can carry a NaN on."""
        loss = float(loss_sum) / target_tokens
        if not math.isfinite(loss):
            raise TrainingError(self._not_finite("loss", loss, step))
        grad_norm, bad_parameter = self._state.optimizer.gradient_norm(1.0 / target_tokens)
        if not math.isfinite(grad_norm):
            raise TrainingError(self._not_finite(self._gradient_of(bad_parameter), grad_norm, step))
        return loss, grad_norm

    def _gradient_of(self, parameter: Tensor | None) -> str:
        for name, candidate in self._state.parameters.items():
            if candidate is parameter:
                return f"the gradient of {name}"
        return "the norm of all gradients"

    def _not_finite(self, what: str, value: float, step: int) -> str:
        return (
            f"training stopped at step {step}: {what} is not finite ({value}); the weights are still those of "
            f"step {step - 1}; try a lower optim.learning_rate or trainer.compute_dtype=float32"
        )


def loss_by_length(sums: list[float], target_tokens: list[int]) -> dict[str, float]:
    """Return the loss a target token of the rows of each length bucket, where the step has any.

    Steps of grouped rows are of one length each, and short rows lose more a token: beside a curve that saws for that
    reason these show what is learnt.
    """
    counted = enumerate(zip(sums, target_tokens, strict=True))
    return {f"train/loss_{bucket_name(bucket)}": total / tokens for bucket, (total, tokens) in counted if tokens}
