"""Which token pads, and tokens that a vocabulary gains."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.config.schema import ModelConfig
from qlora_lab.errors import ModelError, nearest


def settle_special_tokens(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Add model.new_tokens, and see that padding is not eos: code of others may mask by id and lose every end.

    A tokenizer without a pad token of its own pads with another special token. Which one makes no difference here,
    where padding is masked by position.

    Raises:
        ModelError: a new token that is there already, a pad token that is not or is eos, or nothing to pad with.
    """
    vocabulary = tokenizer.get_vocab()
    for token in model.new_tokens:
        if token in vocabulary:
            raise ModelError(f"model.new_tokens must be new; the tokenizer of {model.name} has '{token}' already")
    if model.new_tokens:
        # Not special ones: those are only text where a data set holds their names, and left out of what is decoded.
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in model.new_tokens])
    eos = tokenizer.eos_token
    if model.pad_token is not None:
        tokenizer.pad_token = _checked_pad(model, tokenizer)
    elif tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = next(_spare_tokens(tokenizer), None)
        if spare is None:
            raise ModelError(
                f"the tokenizer of {model.name} has no pad token apart from eos ('{eos}'), and no other special token "
                "to pad with; set model.pad_token to any other of its tokens, or to one of model.new_tokens"
            )
        tokenizer.pad_token = spare


def _checked_pad(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    pad, vocabulary = str(model.pad_token), tokenizer.get_vocab()
    if pad not in vocabulary:
        raise ModelError(
            f"model.pad_token must be a token of {model.name}, or one of model.new_tokens; got '{pad}'"
            f"{nearest(pad, tokenizer.all_special_tokens)}"
        )
    if pad == tokenizer.eos_token:
        raise ModelError(f"model.pad_token must not be eos, which every target ends with; got '{pad}'")
    return pad


def _spare_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Give special tokens other than eos: those called pad first, then unk, then the others by number."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    special = [str(token) for _, token in added if token.special and str(token) != tokenizer.eos_token]
    yield from (token for token in special if "pad" in token.lower())
    if tokenizer.unk_token is not None and tokenizer.unk_token != tokenizer.eos_token:
        yield str(tokenizer.unk_token)
    yield from special


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: list[str]) -> None:
    """Give new tokens rows in the embeddings and the head: the mean of all there were. They stay as frozen as the rest.

    Raises:
        ModelError: the tokenizer has more tokens than the model, and not by `new_tokens`.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    known = len(tokenizer) - len(new_tokens)
    if known > rows:
        raise ModelError(f"the tokenizer has {known} tokens, but the model {rows}; is it the tokenizer of this model?")
    if not new_tokens:
        return
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    places: Any = tokenizer.convert_tokens_to_ids(new_tokens)
    for weight in {id(layer.weight): layer.weight for layer in layers if layer}.values():  # once where they are one
        fill_new_rows(weight, known, places)


def fill_new_rows(weight: Tensor, known: int, places: list[int]) -> None:
    """Give the rows at `places` of (tokens, hidden size) the mean of the first `known`, in place."""
    weight[places] = weight[:known].float().mean(0).to(weight.dtype)
