from typing import Any

import pytest
import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from qlora_lab.evaluation.generate import TOKENS_AT_ONCE, Generation, Stops, exact_match, generate, generate_batch
from qlora_lab.evaluation.sampling import Sampling
from tests.tiny_models import T5

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


def test_the_head_gets_the_last_tokens_without_gaps(model: Any, tokenizer: Any, make_rows: Any) -> None:
    """A product of bfloat16 on a CPU copies the whole head for each row otherwise."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda head, args, output: seen.append(args[0]))
    answers(model, tokenizer, [row.prompt_ids for row in make_rows(3)], batch_tokens=10_000)
    hook.remove()
    assert all(hidden.shape[:2] == (3, 1) or len(hidden) < 3 for hidden in seen)
    assert len(seen) > 1 and all(hidden.is_contiguous() for hidden in seen)
    assert not model.get_output_embeddings()._forward_pre_hooks


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


def stopped(model: Any, tokenizer: Any, prompts: Any, stops: Stops, new: int = 7) -> list[Generation]:
    return generate_batch(model, tokenizer, prompts, max_new_tokens=new, device=CPU, stops=stops)


def test_an_answer_ends_with_its_turn(model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompts = [row.prompt_ids for row in make_rows(6)]
    free = stopped(model, tokenizer, prompts, Stops())
    token = free[0].token_ids[2]
    by_token = stopped(model, tokenizer, prompts, Stops(token_ids=(token,)))
    for before, after in zip(free, by_token, strict=True):
        ends = token in before.token_ids
        assert after.stop_reason == ("turn" if ends else before.stop_reason)
        assert after.token_ids == (before.token_ids[: before.token_ids.index(token)] if ends else before.token_ids)
    assert by_token[0].stop_reason == "turn"


def test_a_text_that_begins_another_turn_is_cut_off(model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompts = [row.prompt_ids for row in make_rows(6)]
    free = stopped(model, tokenizer, prompts, Stops())
    place, words = next((place, words) for place, words in enumerate(words_of(free)) if len({*words[:4]}) == 4)
    text = f"{words[2]} {words[3]}"  # of two tokens
    found = stopped(model, tokenizer, prompts, Stops(texts=("not there", text)))
    for before, after in zip(free, found, strict=True):
        assert after.text == before.text.partition(text)[0]
        assert after.stop_reason == ("turn" if text in before.text else before.stop_reason)
    assert words_of(found)[place] == words[:2]
    assert len(found[place].token_ids) == 4  # those of the text were written too


def words_of(generations: list[Generation]) -> list[list[str]]:
    return [generation.text.split() for generation in generations]


def test_the_first_end_counts(model: Any, tokenizer: Any, make_rows: Any) -> None:
    rows = make_rows(6)
    written = stopped(model, tokenizer, [row.prompt_ids for row in rows], Stops())
    place, words = next((place, words) for place, words in enumerate(words_of(written)) if len({*words[:4]}) == 4)
    prompts = [rows[place].prompt_ids]
    early, late = written[place].token_ids[1], written[place].token_ids[3]
    assert stopped(model, tokenizer, prompts, Stops((late,), (words[1],)))[0].text.split() == words[:1]
    assert stopped(model, tokenizer, prompts, Stops((early,), (words[3],)))[0].text.split() == words[:1]


def test_encoder_decoders_draw_and_end_alike(tokenizer: Any, make_rows: Any) -> None:
    torch.manual_seed(1)
    numbers = T5 | {"vocab_size": len(tokenizer), "initializer_factor": 3.0}
    model = T5ForConditionalGeneration(T5Config(**numbers)).eval()
    prompts = [row.prompt_ids for row in make_rows(5)]

    def answers_of(prompts: Any, seeds: list[int], stops: Stops) -> list[Generation]:
        how = Sampling(1.0, 0.9, seeds)
        return generate_batch(model, tokenizer, prompts, max_new_tokens=8, device=CPU, sampling=how, stops=stops)

    free = answers_of(prompts, [1, 2, 3, 4, 5], Stops())
    assert free == [answers_of([prompt], [seed], Stops())[0] for seed, prompt in enumerate(prompts, start=1)]
    assert len({tuple(answer.token_ids) for answer in free}) > 1
    longest = max(free, key=lambda answer: len(answer.token_ids))
    words = longest.text.split()
    ended = answers_of(prompts, [1, 2, 3, 4, 5], Stops(texts=(words[1],)))[free.index(longest)]
    assert (ended.text.split(), ended.stop_reason) == (words[: words.index(words[1])], "turn")
