"""Cross-entropy of target tokens from hidden states, with the logits of a few tokens in memory at a time.

A vocabulary of 49,152 makes 200 kB of float32 logits a token, and autograd keeps several copies, so the
logits of a whole batch would be the largest thing in memory. Here the output head runs over chunks of the target
positions only. Their gradient is worked out in the same pass, which leaves nothing of the size of the logits for the
backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qlora_lab.errors import ShapeError
from qlora_lab.models.head_products import head_input_gradient, head_logits

IGNORE_INDEX = -100  # label of a position without loss


@dataclass(frozen=True)
class OutputHead:
    """The linear map from hidden states to logits.

    `weight` is (vocabulary, hidden), `bias` (vocabulary,) or None; `softcap` bounds the logits to
    `softcap * tanh(logits / softcap)` in architectures that do so (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None


@dataclass(frozen=True)
class GroupedLoss:
    """The loss of each group of tokens, added up beside the loss of all.

    `groups` says which group each label belongs to, in the shape of the labels, int64; `sums` (groups,) is added to,
    in nats.
    """

    groups: Tensor
    sums: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk_tokens: int,
    softcap: float | None = None,
    grouped: GroupedLoss | None = None,
) -> Tensor:
    """Sum the cross-entropy over the positions whose label is not -100.

    Args:
        hidden: (N, hidden size), floating.
        lm_head_weight: (vocabulary, hidden size); gets a gradient only if it requires one.
        bias: (vocabulary,) or None.
        labels: (N,) int64; the token that position i must predict, or -100.
        chunk_tokens: rows of logits in memory at once.
        softcap: bound of the logits, see OutputHead.
        grouped: gets the losses of each group as well, where gradients are worked out.

    Returns:
        0-d, nats; float32, or float64 where hidden is.

    Raises:
        ShapeError: hidden, head and labels do not belong together.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1] or lm_head_weight.shape[1:] != hidden.shape[1:]:
        raise ShapeError(
            f"hidden must be (N, H), lm_head_weight (V, H) and labels (N,); got {tuple(hidden.shape)}, "
            f"{tuple(lm_head_weight.shape)} and {tuple(labels.shape)}"
        )
    positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if not torch.is_grad_enabled():
        losses = token_losses(hidden, OutputHead(lm_head_weight, bias, softcap), labels, positions, chunk_tokens)
        return losses.sum()
    loss: Tensor = _ChunkedCrossEntropy.apply(
        hidden, lm_head_weight, bias, labels, positions, chunk_tokens, softcap, grouped
    )
    return loss


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Return a fresh tensor of logits, in float32 at least; a head that is trained has float32 weights itself."""
    logits = head_logits(hidden.to(weight.dtype), weight, bias)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def token_losses(hidden: Tensor, head: OutputHead, labels: Tensor, positions: Tensor, chunk_tokens: int) -> Tensor:
    """Return the loss at each of `positions`, in nats."""
    losses = []
    for chunk in positions.split(chunk_tokens):
        logits = logits_of(hidden[chunk], head.weight, head.bias, head.softcap)
        losses.append(functional.cross_entropy(logits, labels[chunk], reduction="none"))
        del logits  # or they would be there beside the next chunk's
    return torch.cat(losses) if losses else hidden.new_zeros(0)


def _losses_and_gradient(logits: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return each loss, (tokens, 1), and the gradient of their sum to the logits before the softcap, in their place."""
    targets = labels.unsqueeze(1)
    slope = None if softcap is None else 1 - (logits / softcap).square()
    # softmax in place: one buffer of logits is all that exists
    logits.sub_(logits.amax(1, keepdim=True))
    target_logits = logits.gather(1, targets)
    total = logits.exp_().sum(1, keepdim=True)
    losses = total.log() - target_logits
    gradient = logits.div_(total).scatter_add_(1, targets, -torch.ones_like(total))
    return losses, gradient if slope is None else gradient.mul_(slope)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Works out the gradients in the forward pass, chunk by chunk; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        positions: Tensor,
        chunk_tokens: int,
        softcap: float | None,
        grouped: GroupedLoss | None,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        for chunk in positions.split(chunk_tokens):
            states = hidden[chunk]
            logits = logits_of(states, weight, bias, softcap)
            losses, grad_logits = _losses_and_gradient(logits, labels[chunk], softcap)
            loss += losses.sum()
            if grouped is not None:
                grouped.sums.index_add_(0, grouped.groups[chunk], losses.squeeze(1).to(grouped.sums.dtype))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, states.to(exact))
            if grad_hidden is not None:
                # under autocast the product is in its dtype, and hidden states may not be
                grad_hidden[chunk] = head_input_gradient(grad_logits, weight).to(grad_hidden.dtype)
            del logits, grad_logits  # or they would be there beside the next chunk's
        ctx.grads = (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if bias is not None and grad_bias is not None else None,
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = tuple(None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.grads)
        return (*scaled, None, None, None, None, None)
