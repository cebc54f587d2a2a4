"""Tokens are drawn from the nucleus with their shares, and by nothing but a prompt's own seed."""

from typing import Any

import pytest
import torch

from qlora_lab.evaluation import sampling
from qlora_lab.evaluation.generate import generate_batch
from qlora_lab.evaluation.sampling import Sampling, nucleus_draw, prompt_seed

CPU = torch.device("cpu")
DRAWS = 4000


def shares_drawn(logits: torch.Tensor, **how: float) -> torch.Tensor:
    """Return how often each token is drawn when numbers lie evenly between 0 and 1."""
    uniforms = torch.arange(DRAWS, dtype=torch.float64) / DRAWS
    drawn = nucleus_draw(logits.expand(DRAWS, -1), uniforms, **how)
    return torch.bincount(drawn, minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, 4), (0.79, 2), (0.81, 3), (0.4, 1), (0.01, 1)], ids=lambda value: f"{value:g}"
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: int) -> None:
    shares = torch.tensor([0.15, 0.5, 0.05, 0.3])
    expected = torch.where(shares >= shares.sort(descending=True).values[kept - 1], shares, 0.0)
    found = shares_drawn(shares.log(), temperature=1.0, top_p=top_p)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=2 / DRAWS)


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    found = shares_drawn(logits, temperature=2.0, top_p=1.0)
    torch.testing.assert_close(found, torch.softmax(logits / 2, 0), rtol=0, atol=2 / DRAWS)


def test_a_flat_distribution_over_a_large_vocabulary_is_drawn_from_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LIKELIEST", 3)
    found = shares_drawn(torch.zeros(10), temperature=1.0, top_p=0.95)
    torch.testing.assert_close(found, torch.full((10,), 0.1), rtol=0, atol=2 / DRAWS)


def drawn(model: Any, tokenizer: Any, prompts: Any, seeds: list[int], top_p: float = 0.9) -> list[list[int]]:
    how = Sampling(1.0, top_p, seeds)
    found = generate_batch(model, tokenizer, prompts, max_new_tokens=9, device=CPU, sampling=how)
    return [answer.token_ids for answer in found]


def test_what_shares_a_batch_does_not_change_what_is_drawn(model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompts = [row.prompt_ids for row in make_rows(7)]
    seeds = [prompt_seed(3, str(place)) for place in range(7)]
    together = drawn(model, tokenizer, prompts, seeds)
    alone = [drawn(model, tokenizer, [prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert drawn(model, tokenizer, prompts[::-1], seeds[::-1]) == together[::-1]
    assert len({len(answer) for answer in together}) > 1  # rows that end early leave the batch


def test_seeds_tell_prompts_and_settings_apart(model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompt = make_rows(1)[0].prompt_ids
    seeds = [prompt_seed(seed, question) for seed in range(3) for question in ("1", "2")]
    assert len(set(seeds)) == 6
    assert len({tuple(answer) for answer in drawn(model, tokenizer, [prompt] * 6, seeds)}) > 3


def test_the_smallest_nucleus_is_the_likeliest_token(model: Any, tokenizer: Any, make_rows: Any) -> None:
    prompts = [row.prompt_ids for row in make_rows(3)]
    greedy = generate_batch(model, tokenizer, prompts, max_new_tokens=9, device=CPU)
    assert drawn(model, tokenizer, prompts, [1, 2, 3], top_p=1e-9) == [answer.token_ids for answer in greedy]
