"""Dropout that remembers nothing: whether an element is dropped follows from a seed and the element's number.

The formula of kernels/include/qlk/dropout.h in torch: 64-bit integers with masks stand for its 32-bit ones.
"""

import torch
from torch import Tensor

RANGE = 2**24  # draws are smaller
LOW_NUMBERS = 2**32  # elements that share a key
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def drop(x: Tensor, share: float, seed: int) -> Tensor:
    """Return x with about `share` of its elements zeroed and the rest scaled by 1 / (1 - share).

    Args:
        x: any shape; its elements are numbered as they lie when contiguous.
        share: in [0, 1), rounded to float32.
        seed: 64 bits; a negative one stands for its two's complement.
    """
    if share == 0.0:
        return x
    share32 = torch.tensor(share, dtype=torch.float32)
    scale = (1.0 / (1.0 - share32)).item()
    return torch.where(draws(x.numel(), seed, x.device).view(x.shape) < int(share32 * RANGE), 0.0, x * scale)


def draws(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the number that each of `count` elements draws: (count,) int64 below RANGE."""
    pieces = []
    for start in range(0, max(count, 1), LOW_NUMBERS):
        before, between = key(seed, start // LOW_NUMBERS)
        x = torch.arange(min(LOW_NUMBERS, count - start), device=device) ^ before
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
        x = ((x ^ (x >> 15)) + between) & MASK32
        x = (x * 0x846CA68B) & MASK32
        pieces.append((x ^ (x >> 16)) >> 8)
    return torch.cat(pieces)


def key(seed: int, high: int) -> tuple[int, int]:
    """Return the two 32-bit numbers that elements with the same high half of their number have in common."""
    both = mix64((mix64((seed + 0x9E3779B97F4A7C15) & MASK64) + high) & MASK64)
    return both & MASK32, both >> 32


def mix64(x: int) -> int:
    """Return x with every bit spread over all 64 (Steele et al. 2014, the finalizer of SplitMix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
