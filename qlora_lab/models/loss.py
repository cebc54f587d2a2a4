"""The loss of a batch for causal models, encoder-decoders and classifiers.

Language models are taken apart: the body gives hidden states, and the output head is left to `cross_entropy`, which
never holds the logits of a whole batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_lab.config.schema import CAUSAL, CLASSIFICATION, SEQ2SEQ
from qlora_lab.errors import ModelError
from qlora_lab.models.cross_entropy import (
    IGNORE_INDEX,
    GroupedLoss,
    OutputHead,
    chunked_cross_entropy,
    logits_of,
    token_losses,
)
from qlora_lab.models.packing import packed_inputs
from qlora_lab.models.tasks import task_of


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
    actual = logits_of(hidden.flatten(0, 1), head.weight, head.bias, head.softcap).view_as(expected)
    # bfloat16 logits carry 8 bits; a scale or a cap that is left out changes far more than 2 %
    allowed = 0.02 * expected.abs().max().item() + 1e-4
    difference = (actual - expected).abs().max().item()
    if difference > allowed:  # not so where both are NaN: that is for the guard of the first step
        raise ModelError(
            f"the output head of {type(model).__name__} does more than a linear layer (its logits differ by "
            f"{difference:.3g} from weight times hidden state); this architecture is not supported"
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
    losses = token_losses(hidden.flatten(0, 1), output_head(model), flat, positions, chunk_tokens)
    sums = torch.zeros(labels.shape[0], dtype=torch.float64, device=losses.device)
    sums.index_add_(0, positions // labels.shape[1], losses.double())
    return sums, counts


@torch.no_grad()
def target_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits from which each target of a batch is predicted, and the targets, row by row.

    Args:
        batch: as in `target_loss`.

    Returns:
        (targets, vocabulary or classes), in float32 at least, and (targets,) int64.
    """
    if task_of(model) == CLASSIFICATION:
        return class_logits(model, batch), batch["labels"][:, 1]
    hidden, labels = _hidden_and_labels(model, batch)
    chosen = labels != IGNORE_INDEX
    head = output_head(model)
    return logits_of(hidden[chosen], head.weight, head.bias, head.softcap), labels[chosen]


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
