"""What a merge keeps: the logits and the perplexity of base, base with adapter, and merged model, side by side."""

import math
from collections.abc import Iterable, Iterator, Sequence
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

MOST_TARGETS = 512  # whose logits are compared; of a vocabulary of 128,256 they take 0.26 GB a model
BATCH_TOKENS = 1024
# Largest change that passes, as a share of the logits' spread: the sum of all differences over that of all distances
# from the mean of their row. Merged into what was trained on, only rounding differs, once a weight and once a product.
TOLERANCES = {"float32": 0.001, "float16": 0.02, "bfloat16": 0.1}
# Another base (unquantized), or quantized again: the error of 4 bits itself.
TOLERANCE_OF_QUANTIZATION = 0.5
LEAST_KEPT = 0.5  # of the adapter's change, which rounding may swallow without changing the logits by much


@dataclass(frozen=True)
class Comparison:
    """The merged model beside the two that it is made of, on the same targets.

    A logit counts by its distance from the mean of its row: what is added to all of them changes no probability.

    Attributes:
        max_difference, mean_difference: of the logits before and after merging, absolute.
        relative_difference: mean_difference over the logits' mean distance from the mean of their row.
        change_kept: how far the merged model has come from the base towards base and adapter, as a share of that way;
            NaN where the adapter changes nothing.
        top1_agreement: share of targets for which both give the same token (or class) the highest logit.
        perplexity_base, perplexity_before, perplexity_after: of the base, of base and adapter, and of the merged model.
        memory_bytes: of the weights of the largest of them; they were in memory one after the other.
    """

    rows: int
    targets: int
    max_difference: float
    mean_difference: float
    relative_difference: float
    change_kept: float
    top1_agreement: float
    perplexity_base: float
    perplexity_before: float
    perplexity_after: float
    memory_bytes: int

    def __str__(self) -> str:
        kept = "" if math.isnan(self.change_kept) else f"; {self.change_kept:.1%} of the adapter's change is kept"
        return (
            f"logits differ by {self.mean_difference:.2g} on average (at most {self.max_difference:.2g}), "
            f"{self.relative_difference:.2%} of their spread{kept}; the likeliest token is the same for "
            f"{self.top1_agreement:.1%} of {self.targets:,} targets in {self.rows} held-out rows; perplexity "
            f"{self.perplexity_base:.4f} of the base, {self.perplexity_before:.4f} with the adapter, "
            f"{self.perplexity_after:.4f} merged; compared one after the other, in memory for one model of "
            f"{self.memory_bytes / 1e9:.3g} GB"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"change_kept": None if math.isnan(self.change_kept) else self.change_kept}


@dataclass(frozen=True)
class Seen:
    """What a model says of a batch's targets."""

    logits: Tensor  # (targets, vocabulary), float32 on the CPU, each row with the mean 0
    labels: Tensor  # (targets,)

    @property
    def loss(self) -> float:
        """Sum of all targets' nats."""
        return functional.cross_entropy(self.logits, self.labels, reduction="sum").item()


def compare(models: Iterable[PreTrainedModel], rows: Sequence[Example], pad_id: int) -> Comparison:
    """Compare the base, base and adapter, and the merged model.

    Args:
        models: these three, in this order; each is let go before the next is asked for.
        rows: on whose targets; as many of them as have MOST_TARGETS targets.
    """
    rows = within_targets(rows)
    memory: list[int] = []

    def seen_by(model: PreTrainedModel) -> list[Seen]:
        memory.append(model.get_memory_footprint())
        return list(seen(model, rows, pad_id))

    bare, before, after = map(seen_by, models)  # not a loop, whose variable would keep a model
    targets = sum(len(batch.labels) for batch in before)
    largest = differences = spread = agreed = way = come = 0.0
    for base, ours, theirs in zip(bare, before, after, strict=True):
        change = (theirs.logits - ours.logits).abs()
        largest = max(largest, change.max().item())
        differences += change.double().mean(1).sum().item()
        spread += ours.logits.abs().double().mean(1).sum().item()
        agreed += (theirs.logits.argmax(1) == ours.logits.argmax(1)).sum().item()
        wanted = (ours.logits - base.logits).double()
        way += wanted.square().sum().item()
        come += (wanted * (theirs.logits - base.logits)).sum().item()
    perplexities = [math.exp(sum(batch.loss for batch in batches) / targets) for batches in (bare, before, after)]
    return Comparison(
        rows=len(rows),
        targets=targets,
        max_difference=largest,
        mean_difference=differences / targets,
        relative_difference=differences / spread if spread else math.nan,
        change_kept=come / way if way else math.nan,
        top1_agreement=agreed / targets,
        perplexity_base=perplexities[0],
        perplexity_before=perplexities[1],
        perplexity_after=perplexities[2],
        memory_bytes=max(memory),
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
        logits = logits.float().cpu()
        yield Seen(logits - logits.mean(1, keepdim=True), labels.cpu())


def tolerance_of(into: str, dtypes: Iterable[str]) -> float:
    """Return the largest relative difference that a merge may have unless it is told another.

    Args:
        dtypes: in which the two models compute: the coarser one rounds.
    """
    rounding = max(TOLERANCES[dtype] for dtype in dtypes)
    return rounding if into == DEQUANTIZED else max(rounding, TOLERANCE_OF_QUANTIZATION)
