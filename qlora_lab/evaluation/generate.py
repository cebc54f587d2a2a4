"""Greedy generation in batches, and the comparison of what came out with the target."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.data.batching import left_pad, pad_right
from qlora_lab.evaluation.batches import budget_batches

TOKENS_AT_ONCE = 4


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt."""

    token_ids: list[int]  # without the end-of-sequence token
    text: str
    stop_reason: str  # "eos", or "length" where max_new_tokens ended it; "class" of a classifier


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    device: torch.device,
) -> list[Generation]:
    """Continue each prompt with the likeliest token, over and over, or answer it so; in the order of `prompts`.

    Args:
        prompts: token ids of each prompt; none is empty.
        max_new_tokens: most tokens to write, the end-of-sequence token included.
        batch_tokens: most tokens in a batch, those to come and padding included.
    """
    generations: list[Generation | None] = [None] * len(prompts)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    write = _answer_batch if model.config.is_encoder_decoder else _generate_batch
    with _without_own_wishes(model):
        for batch in budget_batches(lengths, batch_tokens):
            written = write(model, tokenizer, [prompts[row] for row in batch], max_new_tokens, device)
            for row, token_ids in zip(batch, written, strict=True):
                generations[row] = _read(tokenizer, token_ids)
    return [generation for generation in generations if generation is not None]


def exact_match(generation: str, target: str) -> bool:
    """Compare after white space at both ends is dropped, and nothing else: case and punctuation count."""
    return generation.strip() == target.strip()


@contextmanager
def _without_own_wishes(model: PreTrainedModel) -> Iterator[None]:
    """Set a model's own generation_config aside: it may sample, forbid tokens, force some or shift their logits."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """Return the new tokens of each prompt; after an end-of-sequence token anything may follow.

    `generate` works on every row until the last one stops. Short answers are the rule here, so it is called for
    a few tokens at a time, and goes on from its cache with the rows that did not stop.
    """
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    inputs = {name: tensor.to(device) for name, tensor in left_pad(prompts, tokenizer.pad_token_id).items()}
    tokens_left = max_new_tokens
    while rows:
        config = _greedy(tokenizer, min(TOKENS_AT_ONCE, tokens_left))
        output = model.generate(**inputs, generation_config=config)  # type: ignore[operator]  # of a mixin
        new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        for row, token_ids in zip(rows, new_tokens.tolist(), strict=True):
            written[row] += token_ids
        tokens_left -= TOKENS_AT_ONCE
        going = torch.tensor([tokenizer.eos_token_id not in written[row] for row in rows]).nonzero()[:, 0]
        rows = [rows[number] for number in going.tolist()] if tokens_left > 0 else []
        if rows:
            inputs = _next_inputs(inputs["attention_mask"], output, going.to(device))
    return written


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """Return what an encoder-decoder writes to each prompt; after an end-of-sequence token anything may follow."""
    inputs = {name: tensor.to(device) for name, tensor in pad_right(prompts, tokenizer.pad_token_id).items()}
    config = _greedy(tokenizer, max_new_tokens)
    config.decoder_start_token_id = model.config.decoder_start_token_id
    output = model.generate(**inputs, generation_config=config)  # type: ignore[operator]  # of a mixin
    written: list[list[int]] = output.sequences[:, 1:].tolist()
    return written


def _next_inputs(attention_mask: Tensor, output: Any, going: Tensor) -> dict[str, Any]:
    """Take the rows `going` on from where `generate` got to."""
    new_tokens = output.sequences.shape[1] - attention_mask.shape[1]
    if len(going) < len(attention_mask):  # else a copy of the cache for nothing
        output.past_key_values.batch_select_indices(going)
    return {
        "input_ids": output.sequences[going],
        "attention_mask": functional.pad(attention_mask, (0, new_tokens), value=1)[going],
        "past_key_values": output.past_key_values,
    }


def _greedy(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _read(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> Generation:
    stopped = tokenizer.eos_token_id in token_ids
    if stopped:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
    return Generation(token_ids, text, "eos" if stopped else "length")
