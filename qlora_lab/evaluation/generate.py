"""Generation in batches, and the comparison of what came out with the target."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.config.schema import CAUSAL
from qlora_lab.data.batching import left_pad, pad_right
from qlora_lab.evaluation.batches import budget_batches
from qlora_lab.evaluation.sampling import NucleusDraw, Sampling
from qlora_lab.models.head_products import whole_head_inputs

TOKENS_AT_ONCE = 4


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt."""

    token_ids: list[int]  # without the token that ended it
    text: str  # without the text that ended it
    stop_reason: str  # "eos"; "turn", the end of a turn; "length", max_new_tokens; "class" of a classifier


@dataclass(frozen=True)
class Stops:
    """What ends an answer besides the end-of-sequence token."""

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


NO_STOPS = Stops()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    device: torch.device,
    stops: Stops = NO_STOPS,
    advance: Callable[[int], object] = lambda prompts: None,
) -> list[Generation]:
    """Continue each prompt with the likeliest token, over and over, or answer it so; in the order of `prompts`.

    Args:
        prompts: token ids of each prompt; none is empty.
        max_new_tokens: most tokens to write, the end-of-sequence token included.
        batch_tokens: most tokens in a batch, those to come and padding included.
        stops: what ends an answer besides the end-of-sequence token.
        advance: told, batch by batch, how many more prompts are answered.
    """
    generations: list[Generation | None] = [None] * len(prompts)
    batches = generation_batches(prompts, max_new_tokens, batch_tokens)
    for batch in batches:
        written = generate_batch(
            model, tokenizer, [prompts[row] for row in batch], max_new_tokens=max_new_tokens, device=device, stops=stops
        )
        for row, generation in zip(batch, written, strict=True):
            generations[row] = generation
        advance(len(batch))
    return [generation for generation in generations if generation is not None]


def prompt_room(task: str, max_length_tokens: int, max_new_tokens: int) -> int:
    """Return the most tokens of a prompt: only a causal model writes its answer into the context that it reads.

    Args:
        task: of the model.
        max_length_tokens: that it reads at once.
        max_new_tokens: of an answer.
    """
    return max_length_tokens - max_new_tokens if task == CAUSAL else max_length_tokens


def generation_batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Return the numbers of the prompts that are answered together."""
    return budget_batches([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens)


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    device: torch.device,
    sampling: Sampling | None = None,
    stops: Stops = NO_STOPS,
) -> list[Generation]:
    """Continue, or answer, prompts that are worked on together.

    Args:
        prompts: token ids of each prompt; none is empty.
        max_new_tokens: most tokens to write, the end-of-sequence token included.
        sampling: how tokens are drawn, with a seed for each prompt; None: always the likeliest.
        stops: what ends an answer besides the end-of-sequence token.
    """
    writer = _Writer(model, tokenizer, max_new_tokens, device, sampling, stops)
    write = writer.answer if model.config.is_encoder_decoder else writer.go_on
    with _without_own_wishes(model), whole_head_inputs(model):
        return [_read(tokenizer, token_ids, stops) for token_ids in write(prompts)]


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


@dataclass(frozen=True)
class _Writer:
    """Writes new tokens for one batch; after what ends an answer anything may follow."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    device: torch.device
    sampling: Sampling | None
    stops: Stops

    def go_on(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the new tokens of each prompt.

        `generate` works on every row until the last one stops. Short answers are the rule here, so it is called for
        a few tokens at a time, and goes on from its cache with the rows that did not stop.
        """
        written: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        inputs = {
            name: tensor.to(self.device) for name, tensor in left_pad(prompts, self.tokenizer.pad_token_id).items()
        }
        start = inputs["input_ids"].shape[1]
        tokens_left = self.max_new_tokens
        while rows:
            output = self._generate(inputs, min(TOKENS_AT_ONCE, tokens_left), rows, start)
            new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
            for row, token_ids in zip(rows, new_tokens.tolist(), strict=True):
                written[row] += token_ids
            tokens_left -= TOKENS_AT_ONCE
            ended = [_has_ended(self.tokenizer, written[row], self.stops) for row in rows]
            going = torch.tensor([not over for over in ended]).nonzero()[:, 0]
            rows = [rows[number] for number in going.tolist()] if tokens_left > 0 else []
            if rows:
                inputs = _next_inputs(inputs["attention_mask"], output, going.to(self.device))
        return written

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return what an encoder-decoder writes to each prompt."""
        inputs = {
            name: tensor.to(self.device) for name, tensor in pad_right(prompts, self.tokenizer.pad_token_id).items()
        }
        output = self._generate(inputs, self.max_new_tokens, range(len(prompts)), start=1)
        written: list[list[int]] = output.sequences[:, 1:].tolist()
        return written

    def _generate(self, inputs: dict[str, Any], new_tokens: int, rows: Sequence[int], start: int) -> Any:
        """Write some tokens.

        Args:
            rows: the places of these rows among the prompts of the batch.
            start: tokens that stood there before the first new one.
        """
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            use_cache=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=[self.tokenizer.eos_token_id, *self.stops.token_ids],
            decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
        )
        drawn = LogitsProcessorList()
        if self.sampling is not None:
            drawn.append(NucleusDraw(self.sampling, rows, self.max_new_tokens, start))
        return self.model.generate(**inputs, generation_config=config, logits_processor=drawn)  # type: ignore[operator]


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


def _has_ended(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stops: Stops) -> bool:
    if tokenizer.eos_token_id in token_ids or any(token in token_ids for token in stops.token_ids):
        return True
    return bool(stops.texts) and _stop_place(_decoded(tokenizer, token_ids), stops) is not None


def _read(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stops: Stops) -> Generation:
    """Cut what was written where it first ended."""
    reason = "length"
    ends = (tokenizer.eos_token_id, *stops.token_ids)
    first = next((place for place, token in enumerate(token_ids) if token in ends), None)
    if first is not None:
        reason = "eos" if token_ids[first] == tokenizer.eos_token_id else "turn"
        token_ids = token_ids[:first]
    text = _decoded(tokenizer, token_ids)
    if _stop_place(text, stops) is None:
        return Generation(token_ids, text, reason)
    while _stop_place(_decoded(tokenizer, token_ids[:-1]), stops) is not None:  # what came after it
        token_ids = token_ids[:-1]
    text = _decoded(tokenizer, token_ids)
    return Generation(token_ids, text[: _stop_place(text, stops)], "turn")


def _stop_place(text: str, stops: Stops) -> int | None:
    """Return where the first of the texts begins that end an answer."""
    return min((place for stop in stops.texts if (place := text.find(stop)) >= 0), default=None)


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))
