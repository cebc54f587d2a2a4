"""What a merge changes: the logits and the perplexity of base and adapter beside those of the merged model."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_lab.config.schema import DEQUANTIZED
from qlora_lab.data.batching import collate
from qlora_lab.data.tokenization import Example
from qlora_lab.evaluation.batches import budget_batches
from qlora_lab.models.loss import target_logits

MOST_TARGETS = 1024  # whose logits are compared; of a vocabulary of 128,256 they take 0.5 GB
BATCH_TOKENS = 1024
# Largest change that passes, as a share of the logits' spread: the sum of all differences over that of all distances
# from the mean of their row. Merged into what was trained on, only rounding differs, once a weight and once a product.
TOLERANCES = {"float32": 0.001, "float16": 0.02, "bfloat16": 0.1}
# Another base (unquantized), or quantized again: the error of 4 bits itself.
TOLERANCE_OF_QUANTIZATION = 0.5


@dataclass(frozen=True)
class Comparison:
    """Two models on the same targets.

    Attributes:
        max_difference, mean_difference: of the logits, absolute.
        relative_difference: mean_difference over the logits' mean distance from the mean of their row.
        top1_agreement: share of targets for which both give the same token (or class) the highest logit.
        perplexity_before, perplexity_after: of base and adapter, and of the merged model.
    """

    rows: int
    targets: int
    max_difference: float
    mean_difference: float
    relative_difference: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float

    def __str__(self) -> str:
        return (
            f"logits differ by {self.mean_difference:.2g} on average (at most {self.max_difference:.2g}), "
            f"{self.relative_difference:.2%} of their spread; the likeliest token is the same for "
            f"{self.top1_agreement:.1%} of {self.targets:,} targets in {self.rows} held-out rows; perplexity "
            f"{self.perplexity_before:.4f} before, {self.perplexity_after:.4f} after"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """What a model says of a batch's targets."""

    logits: Tensor  # (targets, vocabulary), float32 on the CPU
    labels: Tensor  # (targets,)


Opened = AbstractContextManager[PreTrainedModel]


def compare(
    before: Callable[[], Opened], after: Callable[[], Opened], rows: Sequence[Example], pad_id: int
) -> Comparison:
    """Compare two models, of which only one is in memory at a time.

    Args:
        before, after: open one of them, as contexts.
        rows: on whose targets; as many of them as have MOST_TARGETS targets.
    """
    rows = within_targets(rows)
    with before() as model:
        expected = list(seen(model, rows, pad_id))
        del model
    largest = differences = spread = agreed = 0.0
    losses, targets = [0.0, 0.0], 0
    with after() as model:
        for ours, theirs in zip(expected, seen(model, rows, pad_id), strict=True):
            change = (theirs.logits - ours.logits).abs()
            largest = max(largest, change.max().item())
            differences += change.double().mean(1).sum().item()
            spread += (ours.logits - ours.logits.mean(1, keepdim=True)).abs().double().mean(1).sum().item()
            agreed += (theirs.logits.argmax(1) == ours.logits.argmax(1)).sum().item()
            for number, one in enumerate((ours, theirs)):
                losses[number] += functional.cross_entropy(one.logits, one.labels, reduction="sum").item()
            targets += len(ours.labels)
    return Comparison(
        rows=len(rows),
        targets=targets,
        max_difference=largest,
        mean_difference=differences / targets,
        relative_difference=differences / spread if spread else math.nan,
        top1_agreement=agreed / targets,
        perplexity_before=math.exp(losses[0] / targets),
        perplexity_after=math.exp(losses[1] / targets),
    )


def within_targets(rows: Sequence[Example]) -> list[Example]:
    """Return the first rows, up to the one that makes MOST_TARGETS targets; at least one."""
    kept: list[Example] = []
    targets = 0
    for row in rows:
        targets += row.length - row.loss_start
        if kept and targets > MOST_TARGETS:
            break
        kept.append(row)
    return kept


@torch.inference_mode()
def seen(model: PreTrainedModel, rows: Sequence[Example], pad_id: int) -> Iterator[Seen]:
    for batch in budget_batches([row.length for row in rows], BATCH_TOKENS):
        tensors = collate([rows[number] for number in batch], pad_id)
        logits, labels = target_logits(model, {name: tensor.to(model.device) for name, tensor in tensors.items()})
        yield Seen(logits.float().cpu(), labels.cpu())


def tolerance_of(into: str, dtype: str) -> float:
    """Return the largest relative difference that a merge may have unless it is told another."""
    return TOLERANCES[dtype] if into == DEQUANTIZED else max(TOLERANCES[dtype], TOLERANCE_OF_QUANTIZATION)
