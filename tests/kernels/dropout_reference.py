"""The dropout of the native adapter (kernels/include/qlk/dropout.h) in torch, and in Python integers."""

import numpy as np
import torch
from torch import Tensor

RANGE = 2**24
WORD = 2**32 - 1
LONG = 2**64 - 1


def dropped(seed: int, numel: int, share: float) -> Tensor:
    """Return which of the elements 0 ... numel - 1 (less than 2^32) are dropped, (numel,) bool."""
    before, between = key_of(seed, index_high=0)
    x = torch.arange(numel, dtype=torch.int64) ^ before
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD  # products of 32-bit numbers are right in their low 32 bits if they wrap
    x = ((x ^ (x >> 15)) + between) & WORD
    x = x * 0x846CA68B & WORD
    return ((x ^ (x >> 16)) >> 8) < threshold_of(share)


def factors(seed: int, shape: tuple[int, int], share: float) -> Tensor:
    """Return what dropout multiplies a float32 matrix of that shape with: 0, or 1 / (1 - share) in float32."""
    scale = np.float32(1) / (np.float32(1) - np.float32(share))
    drop = dropped(seed, shape[0] * shape[1], share).view(shape)
    return torch.where(drop, torch.tensor(0.0), torch.tensor(float(scale), dtype=torch.float32))


def key_of(seed: int, index_high: int) -> tuple[int, int]:
    """Return the two keys of the elements whose numbers have these high 32 bits."""
    key = mix64((mix64((seed + 0x9E3779B97F4A7C15) & LONG) + index_high) & LONG)
    return key & WORD, key >> 32


def threshold_of(share: float) -> int:
    return int(np.float32(share) * np.float32(RANGE))


def mix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & LONG
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & LONG
    return x ^ (x >> 31)
