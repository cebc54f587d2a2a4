"""Loss of a model on the targets of held-out rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from qlora_lab.data.batching import collate
from qlora_lab.data.tokenization import EvalExample, Example
from qlora_lab.evaluation.batches import budget_batches
from qlora_lab.models.loss import row_losses


@dataclass(frozen=True)
class RowLoss:
    """One row's score."""

    loss_sum: float  # nats, over the target tokens
    target_tokens: int  # the end-of-sequence token included
    target_bytes: int  # of the target's text


def score(
    model: PreTrainedModel,
    rows: Sequence[EvalExample],
    *,
    pad_id: int,
    batch_tokens: int,
    chunk_tokens: int,
    device: torch.device,
) -> list[RowLoss]:
    """Return the loss of each row's target, in the order of `rows`.

    What is scored is the target, also where training scores everything (data.loss_on), so that runs can be
    compared. How rows share batches changes a loss by rounding only.

    Args:
        rows: held-out rows.
        pad_id: the token that fills up short rows.
        batch_tokens: most tokens in a batch, padding included.
        chunk_tokens: rows of logits in memory at once.
    """
    examples = [replace(row.example, loss_start=row.example.target_start) for row in rows]
    return score_examples(
        model, examples, pad_id=pad_id, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens, device=device
    )


@torch.inference_mode()
def score_examples(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_tokens: int,
    chunk_tokens: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda rows: None,
) -> list[RowLoss]:
    """Return the loss of each example from its `loss_start` on, in the order of `examples`; the rest as in `score`.

    `advance` is told, batch by batch, how many more examples are scored.
    """
    scores: list[RowLoss | None] = [None] * len(examples)
    for batch in budget_batches([example.length for example in examples], batch_tokens):
        tensors = collate([examples[row] for row in batch], pad_id)
        sums, counts = row_losses(model, {name: tensor.to(device) for name, tensor in tensors.items()}, chunk_tokens)
        for row, loss_sum, target_tokens in zip(batch, sums.tolist(), counts.tolist(), strict=True):
            scores[row] = RowLoss(loss_sum, target_tokens, examples[row].target_bytes)
        advance(len(batch))
    return [scored for scored in scores if scored is not None]


def aggregate(scores: Sequence[RowLoss]) -> dict[str, float]:
    """Pool rows: every target token weighs the same, and every byte.

    The end-of-sequence token is one of the target tokens, in `loss` and in the bits of `bits_per_byte`, though it
    has no byte: that an answer ends is part of what a model has to say, with any tokenizer exactly once a row, and
    the original study counted it too.

    Returns:
        loss: nats a target token; bits_per_byte: of the target's text, comparable between tokenizers;
        target_tokens and rows: how many. A mean over nothing is NaN.
    """
    loss_sum = math.fsum(scored.loss_sum for scored in scores)
    tokens = sum(scored.target_tokens for scored in scores)
    text_bytes = sum(scored.target_bytes for scored in scores)
    return {
        "loss": loss_sum / tokens if tokens else math.nan,
        "bits_per_byte": loss_sum / math.log(2) / text_bytes if text_bytes else math.nan,
        "target_tokens": tokens,
        "rows": len(scores),
    }
