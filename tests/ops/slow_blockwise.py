"""An independent quantizer for tests: one weight at a time, in numpy float32, with nothing shared but the tables."""

import numpy as np
import torch
from torch import Tensor

from qlora_lab.ops.formats import FORMATS


def slow_quantize(weight: Tensor, fmt: str, block_size: int) -> tuple[list[int], list[float]]:
    """Return the code of every weight and the absmax of every block."""
    levels = np.array(FORMATS[fmt].levels, dtype=np.float32)
    middles = (levels[:-1] + levels[1:]) / np.float32(2)
    flat = weight.flatten().float().numpy()
    codes, statistics = [], []
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        absmax = np.abs(block).max()
        statistics.append(float(absmax))
        reciprocal = np.float32(1) / max(absmax, np.float32(1e-38))
        for value in block:
            scaled = value * reciprocal
            rank = sum(bool(middle < scaled) for middle in middles)
            codes.append(FORMATS[fmt].codes[rank])
    return codes, statistics


def slow_dequantize(codes: list[int], statistics: list[float], fmt: str, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return the weights that codes and absmax stand for, flat."""
    levels = np.array(FORMATS[fmt].values_by_code(), dtype=np.float32)
    values = [levels[code] * np.float32(statistics[i // block_size]) for i, code in enumerate(codes)]
    return torch.tensor(np.array(values)).to(dtype)


def unpacked(packed: Tensor, fmt: str, numel: int) -> list[int]:
    """Return the codes in packed bytes."""
    if FORMATS[fmt].bits == 8:
        return packed.tolist()
    halves = [half for byte in packed.tolist() for half in (byte // 16, byte % 16)]
    return halves[:numel]
