from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from qlora_lab.evaluation.generate import TOKENS_AT_ONCE, Generation, exact_match, generate

CPU = torch.device("cpu")


def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    """Append the likeliest token, one whole forward pass each."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def answers(model: Any, tokenizer: Any, prompts: Any, new: int = 6, batch_tokens: int = 60) -> list[Generation]:
    return generate(model, tokenizer, prompts, max_new_tokens=new, batch_tokens=batch_tokens, device=CPU)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(
    model: Any, tokenizer: Any, make_rows: Any, batch_tokens: int
) -> None:
    prompts = [row.prompt_ids for row in make_rows(12)]
    for prompt, answer in zip(prompts, answers(model, tokenizer, prompts, batch_tokens=batch_tokens), strict=True):
        expected = greedy(model, prompt, 6)
        if tokenizer.eos_token_id in expected:
            expected = expected[: expected.index(tokenizer.eos_token_id)]
        assert answer.token_ids == expected
        assert answer.text == tokenizer.decode(expected)


def test_a_row_ends_where_the_model_says_or_at_the_limit(model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompts = [row.prompt_ids for row in make_rows(6)]
    free = [greedy(model, prompt, 6) for prompt in prompts]
    # let the third token of the first answer be the end of sequence for all
    tokenizer = StandIn(tokenizer, eos_token_id=free[0][2])
    found = answers(model, tokenizer, prompts)
    assert found[0].token_ids == free[0][: free[0].index(free[0][2])] and found[0].stop_reason == "eos"
    for tokens, answer in zip(free, found, strict=True):
        stops = tokenizer.eos_token_id in tokens
        assert answer.stop_reason == ("eos" if stops else "length")
        assert answer.token_ids == (tokens[: tokens.index(tokenizer.eos_token_id)] if stops else tokens)
    assert {answer.stop_reason for answer in found} == {"eos", "length"}


class StandIn:
    """A tokenizer with another end-of-sequence token."""

    def __init__(self, tokenizer: Any, eos_token_id: int) -> None:
        self.eos_token_id = self.pad_token_id = eos_token_id
        self.decode = tokenizer.decode


@pytest.mark.parametrize(
    "wishes",
    [
        {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 7},
        {"exponential_decay_length_penalty": (1, 5.0)},
        {"suppress_tokens": "what it would write"},
    ],
    ids=lambda wishes: next(iter(wishes)),
)
def test_a_models_own_wishes_are_not_heard(wishes: dict[str, Any], model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompts = [row.prompt_ids for row in make_rows(2)]
    expected = answers(model, tokenizer, prompts)
    if "suppress_tokens" in wishes:
        wishes = {"suppress_tokens": expected[0].token_ids[:1]}
    own = model.generation_config = GenerationConfig(**wishes)
    assert answers(model, tokenizer, prompts) == expected
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("generation", "target", "expected"),
    [
        ("42", "42", True),
        (" 42\n", "42", True),
        ("42", "42 ", True),
        ("42.", "42", False),
        ("Cat", "cat", False),
        ("a  b", "a b", False),
    ],
)
def test_exact_match_forgives_white_space_at_the_ends_only(generation: str, target: str, expected: bool) -> None:
    assert exact_match(generation, target) is expected


def test_a_row_that_stopped_takes_no_more_work(model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompts = [row.prompt_ids for row in make_rows(6)]
    first_tokens = [greedy(model, prompt, 1)[0] for prompt in prompts]
    tokenizer = StandIn(tokenizer, eos_token_id=first_tokens[0])
    stopping = first_tokens.count(first_tokens[0])
    rows_in_step = []
    model.model.register_forward_hook(lambda _module, _args, output: rows_in_step.append(len(output[0])))
    found = answers(model, tokenizer, prompts, new=8, batch_tokens=10_000)
    assert [answer.token_ids for answer in found].count([]) == stopping
    assert rows_in_step[0] == 6 and rows_in_step[TOKENS_AT_ONCE] <= 6 - stopping
