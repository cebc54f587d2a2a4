"""A cell is timed only if its implementations return what is expected of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BYTES_EQUAL = 0.0
# Largest error of sums of products, as a share of the largest magnitude: in float32 that of adding up to 49,152 of them
# in another order, in bfloat16 two roundings of half a place, 2^-8, each.
PRODUCTS = {"fp32": 1e-4, "bf16": 2**-7}
QUANTIZATION = 0.3  # of the same product with the weight that was quantized: a wrong row or scale is further off


class WrongResultError(SystemExit):
    """An implementation returned something else than what is expected; the message names the cell."""


@dataclass
class Expected:
    """What the work of a cell returns.

    Attributes:
        of: makes it: a number, a tensor, or several.
        tolerances: by name of the implementation, the largest error as a share of the largest magnitude expected of a
            tensor, or `BYTES_EQUAL`. Who is not named returns something else by design.
    """

    of: Callable[[], Any]
    tolerances: dict[str, float]


def check(cell: str, work: dict[str, Callable[[], Any]], expected: Expected) -> dict[str, dict[str, float]]:
    """Call every implementation once; return by name its largest error and the tolerance.

    Raises:
        WrongResultError: one of them returned something else.
    """
    values = list(tensors(expected.of()))
    checked = {}
    for name, tolerance in expected.tolerances.items():
        if name in work:
            error = largest_error(name, cell, list(tensors(work[name]())), values, tolerance)
            checked[name] = {"largest_error": error, "tolerance": tolerance}
    return checked


def largest_error(name: str, cell: str, found: list[Tensor], values: list[Tensor], tolerance: float) -> float:
    shapes = [[list(tensor.shape) for tensor in each] for each in (found, values)]
    if shapes[0] != shapes[1]:
        raise WrongResultError(f"{cell}: {name} returns shapes {shapes[0]}, expected {shapes[1]}; not timed")
    error = max(map(error_of, found, values))
    equal = tolerance != BYTES_EQUAL or all(map(same_bytes, found, values))
    if error > tolerance or not equal:
        allowed = f"at most {tolerance:.3g} is allowed" if tolerance else "equal bytes are expected"
        raise WrongResultError(f"{cell}: {name} is off by {error:.3g} of the largest magnitude, {allowed}; not timed")
    return error


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest magnitude expected; infinity where one is no number."""
    if same_bytes(found, expected):
        return 0.0
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(difference.nan_to_num(nan=torch.inf))


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (found, expected)))


def tensors(result: Any) -> Iterator[Tensor]:
    """Yield the tensors of a result, however they are nested; a number is one of double precision."""
    if isinstance(result, Tensor):
        yield result.detach()
    elif isinstance(result, float):
        yield torch.tensor(result, dtype=torch.float64)
    else:
        for part in result:
            yield from tensors(part)
