"""Cross-entropy of target tokens, with the logits of a few tokens in memory at a time.

A vocabulary of 49,152 makes 200 kB of float32 logits a token, and autograd keeps several copies, so the
logits of a whole batch would be the largest thing in memory. Here the transformer body gives hidden states,
and the output head runs over chunks of the target positions only. Their gradient is worked out in the same
pass, which leaves nothing of the size of the logits for the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_lab.config.schema import CAUSAL, CLASSIFICATION, SEQ2SEQ
from qlora_lab.errors import ModelError, ShapeError
from qlora_lab.models.head_products import head_input_gradient, head_logits
from qlora_lab.models.packing import packed_inputs
from qlora_lab.models.tasks import task_of

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


def output_head(model: PreTrainedModel) -> OutputHead:
    """Return the output head of a language model.

    Raises:
        ModelError: the head is no plain linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"the output head of {type(model).__name__} must be a plain linear layer; got {type(head).__name__}; "
            "leave lm_head out of quantization and of adapter.target_regex"
        )
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return OutputHead(head.weight, head.bias, softcap)


@torch.no_grad()
def check_output_head(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Make sure that body and head taken apart give the logits of the whole model.

    Some architectures scale their logits in ways that no common name announces; training on logits that the
    model would not produce must be refused, not left to be found in the results.

    A classifier is left alone: it is never taken apart.

    Args:
        input_ids: (1, tokens); a few tokens are enough.

    Raises:
        ModelError: they do not.
    """
    if task_of(model) == CLASSIFICATION:
        return
    head = output_head(model)
    hidden, expected = _both_ways(model, input_ids)
    actual = _logits(hidden.flatten(0, 1), head.weight, head.bias, head.softcap).view_as(expected)
    # bfloat16 logits carry 8 bits; a scale or a cap that is left out changes far more than 2 %
    allowed = 0.02 * expected.abs().max().item() + 1e-4
    difference = (actual - expected).abs().max().item()
    if difference > allowed:  # not so where both are NaN: that is for the guard of the first step
        raise ModelError(
            f"the output head of {type(model).__name__} does more than a linear layer (its logits differ by "
            f"{difference:.3g} from weight times hidden state); this architecture is not supported in training"
        )


def _both_ways(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states that training takes, and the logits of the whole model, (1, tokens, ...) each."""
    if task_of(model) == SEQ2SEQ:
        labels = functional.pad(input_ids, (1, 0), value=IGNORE_INDEX)
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        whole = model(input_ids=input_ids, decoder_input_ids=_decoder_inputs(model, labels), use_cache=False)
        return _hidden_and_labels(model, batch)[0], whole.logits.float()
    seen: list[Tensor] = []
    body = model.get_decoder()
    handle = body.register_forward_hook(lambda _module, _args, output: seen.append(output.last_hidden_state))
    try:
        expected = model(input_ids=input_ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    if not seen:
        raise ModelError(
            f"{type(model).__name__} does not call its decoder {type(body).__name__}; "
            "only causal language models of transformers can be trained"
        )
    return seen[-1], expected


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
        losses = _token_losses(hidden, OutputHead(lm_head_weight, bias, softcap), labels, positions, chunk_tokens)
        return losses.sum()
    loss: Tensor = _ChunkedCrossEntropy.apply(
        hidden, lm_head_weight, bias, labels, positions, chunk_tokens, softcap, grouped
    )
    return loss


def target_loss(
    model: PreTrainedModel, batch: dict[str, Tensor], chunk_tokens: int, grouped: GroupedLoss | None = None
) -> tuple[Tensor, int]:
    """Return the summed loss of a batch's targets (0-d, nats, differentiable), and the number of their tokens.

    Args:
        batch: input_ids and attention_mask, each (rows, tokens), right padded, and labels, (rows, label tokens); with
            position_ids in the place of the mask where rows hold several sequences (see models/packing.py). In a
            causal model a label is the token at its own position. For an encoder-decoder the labels are what the
            decoder writes, for a classifier the class, each after one place without a label. In all of them a label
            is predicted from the place before it, so one in the first place is no target.
        chunk_tokens: rows of logits in memory at once.
        grouped: gets the losses of each group as well.
    """
    if task_of(model) == CLASSIFICATION:
        losses = _class_losses(model, batch)
        if grouped is not None:
            grouped.sums.index_add_(0, grouped.groups[:, 1], losses.detach())
        return losses.sum(), count_target_tokens(batch["labels"])
    head = output_head(model)
    hidden, labels = _hidden_and_labels(model, batch)
    if grouped is not None:
        shifted = functional.pad(grouped.groups[:, 1:], (0, labels.shape[1] + 1 - grouped.groups.shape[1]))
        grouped = GroupedLoss(shifted.flatten(), grouped.sums)
    loss = chunked_cross_entropy(
        hidden.flatten(0, 1), head.weight, head.bias, labels.flatten(), chunk_tokens, head.softcap, grouped
    )
    return loss, count_target_tokens(batch["labels"])


@torch.no_grad()
def row_losses(model: PreTrainedModel, batch: dict[str, Tensor], chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss and number of target tokens, without gradients.

    Args:
        batch: as in `target_loss`.

    Returns:
        (rows,) float64 nats, and (rows,) int64.
    """
    counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)
    if task_of(model) == CLASSIFICATION:
        return _class_losses(model, batch).double(), counts
    hidden, labels = _hidden_and_labels(model, batch)
    flat = labels.flatten()
    positions = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    losses = _token_losses(hidden.flatten(0, 1), output_head(model), flat, positions, chunk_tokens)
    sums = torch.zeros(labels.shape[0], dtype=torch.float64, device=losses.device)
    sums.index_add_(0, positions // labels.shape[1], losses.double())
    return sums, counts


def class_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Run a classifier: (rows, classes), in float32 at least."""
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _class_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return each row's loss, (rows,) nats."""
    return functional.cross_entropy(class_logits(model, batch), batch["labels"][:, 1], reduction="none")


def count_target_tokens(labels: Tensor) -> int:
    """Count the labels (rows, tokens) that stand after the first place; see `target_loss`."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def _hidden_and_labels(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run the body: (rows, tokens, hidden size), and the label that each of these states predicts, (rows, tokens)."""
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    if task_of(model) == CAUSAL:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in batch:
            inputs = packed_inputs(model, ids, batch["position_ids"])
        output = model.get_decoder()(**inputs, use_cache=False)
        return output.last_hidden_state, functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    output = model.get_decoder()(
        input_ids=_decoder_inputs(model, labels),
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    )
    # what T5 does before a head that is its embeddings
    scale = model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0
    return output.last_hidden_state * scale, labels[:, 1:]


def _decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return what the decoder reads: the start token, then every label but the last; padding may read as anything."""
    start = model.config.decoder_start_token_id
    inputs = functional.pad(labels[:, 1:-1], (1, 0), value=start)
    return inputs.masked_fill(inputs == IGNORE_INDEX, start)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Return a fresh tensor of logits, in float32 at least; a head that is trained has float32 weights itself."""
    logits = head_logits(hidden.to(weight.dtype), weight, bias)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _token_losses(hidden: Tensor, head: OutputHead, labels: Tensor, positions: Tensor, chunk_tokens: int) -> Tensor:
    """Return the loss at each of `positions`, in nats."""
    losses = []
    for chunk in positions.split(chunk_tokens):
        logits = _logits(hidden[chunk], head.weight, head.bias, head.softcap)
        losses.append(functional.cross_entropy(logits, labels[chunk], reduction="none"))
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
            logits = _logits(states, weight, bias, softcap)
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
