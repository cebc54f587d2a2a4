"""Drawing tokens so that what a prompt gets depends on its own seed alone, whatever it shares a batch with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

LIKELIEST = 1024  # tokens that are looked at first: sorting a whole vocabulary takes longer than a small model's step


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a batch of answers are drawn.

    Attributes:
        temperature: above 0; logits are divided by it.
        top_p: the likeliest tokens that together have this probability are drawn from.
        seeds: one for each prompt of the batch.
    """

    temperature: float
    top_p: float
    seeds: Sequence[int]


def prompt_seed(seed: int, question: str) -> int:
    """Return the seed of one prompt: other prompts and their order do not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed} {question}".encode()).digest()[:6], "big")


def nucleus_draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Draw one token for each row, by where a number falls among the tokens' shares.

    Args:
        logits: (rows, vocabulary).
        uniforms: (rows,) numbers from 0 to below 1.

    Returns:
        (rows,) token ids.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (nucleus sampling).
    """
    shares = torch.softmax(logits.double() / temperature, dim=1)
    for looked_at in (min(LIKELIEST, shares.shape[1]), shares.shape[1]):
        likeliest, tokens = shares.topk(looked_at, dim=1)
        if bool((likeliest.sum(1) >= top_p).all()):
            break
    likelier = likeliest.cumsum(1) - likeliest  # the share of those before each
    kept = torch.zeros_like(shares).scatter(1, tokens, likeliest.masked_fill(likelier >= top_p, 0.0))
    ends = kept.cumsum(1)
    return (ends <= uniforms.to(ends)[:, None] * ends[:, -1:]).sum(1).clamp(max=shares.shape[1] - 1)


class NucleusDraw(LogitsProcessor):
    """Leaves of each row's logits the drawn token alone, so that the likeliest one is it.

    Args:
        rows: the places of these rows among the prompts that `sampling` has seeds of.
        max_new_tokens: numbers that are drawn for each prompt.
        start: tokens of a row before its first new one.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int], max_new_tokens: int, start: int) -> None:
        self._sampling = sampling
        self._uniforms = torch.stack([_uniforms(sampling.seeds[row], max_new_tokens) for row in rows])
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms = self._uniforms[:, input_ids.shape[1] - self._start]
        how = self._sampling
        tokens = nucleus_draw(scores, uniforms, temperature=how.temperature, top_p=how.top_p)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _uniforms(seed: int, count: int) -> Tensor:
    """Return (count,) numbers in float64, drawn on the CPU: the same for every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
