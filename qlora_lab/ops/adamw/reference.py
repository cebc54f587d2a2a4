"""AdamW (Loshchilov & Hutter 2019) with float or 8-bit states: its arithmetic in pure torch.

What native kernels reproduce bit for bit, and the fallback.

8-bit states (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization") are cut into blocks; a block keeps
its largest magnitude (absmax), and each value the rank of the nearest level of the dynamic map, signed for exp_avg
and unsigned for exp_avg_sq.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.ops.blockwise.reference import SMALLEST_ABSMAX, to_blocks
from qlora_lab.ops.blockwise.tables import midpoints
from qlora_lab.ops.formats import dynamic_map_levels

EXP_AVG_ZERO, EXP_AVG_SQ_ZERO = 127, 0  # the codes of zero
CHUNK = 2**17  # elements updated at once: whole blocks, and temporaries that stay in cache
PIECE, LANES = 4096, 16  # squares are summed by piece of a tensor, in lanes side by side
PIECES_AT_ONCE = 1024


class AdamwTensor(NamedTuple):
    """A parameter, its gradient and its states, contiguous and of `numel` elements.

    Parameter and gradient are float32 or bfloat16, both the same; the states are float32.
    With 8-bit states `exp_avg` and `exp_avg_sq` are uint8 codes and have an absmax for each block of elements.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq_absmax: Tensor | None
    weight_decay: float


@dataclass(frozen=True)
class AdamwStep:
    """What the tensors of one update share; `step` counts from 1, and gradients are multiplied by the scale first."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    step: int
    gradient_scale: float = 1.0
    block_size: int = 256


def gradient_norm(gradients: Sequence[Tensor], gradient_scale: float = 1.0) -> tuple[float, int | None]:
    """Return the norm of all gradients together, and the index of the first that is not finite.

    Squares are added in float64 and in one order, so the norm does not depend on threads or devices.

    Args:
        gradients: float32 or bfloat16 tensors of any shape.
        gradient_scale: the norm is multiplied by its magnitude.

    Returns:
        The norm, not finite if a gradient is not; and the index of the first gradient with a NaN or an infinity, or
        None.
    """
    total, first_not_finite = 0.0, None
    for index, square in _squares_of_pieces(gradients):
        total += square
        if first_not_finite is None and not math.isfinite(square):
            first_not_finite = index
    return abs(gradient_scale) * math.sqrt(total), first_not_finite


def adamw_(tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
    """Update parameters and states in place, as `torch.optim.AdamW` does it.

    A bfloat16 parameter is updated in float32 and rounded once, to the nearest, ties to even.
    A block of an 8-bit state that holds a value that is not finite decodes to NaN from then on.
    """
    correction1 = 1.0 - step.beta1**step.step
    correction2 = 1.0 - step.beta2**step.step
    for tensor in tensors:
        if tensor.parameter.numel() == 0:
            continue
        # the C interface takes the weight decay as a float32
        weight_decay = torch.tensor(tensor.weight_decay, dtype=torch.float32).item()
        factors = _Factors(
            gradient_scale=step.gradient_scale,
            decay=1.0 - step.learning_rate * weight_decay,
            beta1=step.beta1,
            beta2=step.beta2,
            step_size=step.learning_rate / correction1,
            inverse_root=1.0 / math.sqrt(correction2),
            eps=step.eps,
        )
        if tensor.exp_avg_absmax is None or tensor.exp_avg_sq_absmax is None:
            _update_float(tensor, factors)
        else:
            _update_blockwise(tensor, tensor.exp_avg_absmax, tensor.exp_avg_sq_absmax, factors, step.block_size)


class _Factors(NamedTuple):
    """What one update multiplies with; torch rounds each to float32 where it meets a tensor."""

    gradient_scale: float
    decay: float
    beta1: float
    beta2: float
    step_size: float
    inverse_root: float
    eps: float


def _update_values(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: _Factors) -> None:
    """Update flat values in place. Every product and sum is a float32 operation of its own, rounded as it stands."""
    gradient = gradient.float() * factors.gradient_scale
    exp_avg.mul_(factors.beta1).add_(gradient * (1.0 - factors.beta1))
    exp_avg_sq.mul_(factors.beta2).add_(gradient * (1.0 - factors.beta2) * gradient)
    root = exp_avg_sq.double().sqrt_().float()  # correctly rounded; torch's float32 root may be the neighbour
    denominator = root.mul_(factors.inverse_root).add_(factors.eps)
    updated = parameter.float().mul_(factors.decay).sub_((exp_avg * factors.step_size).div_(denominator))
    if updated.data_ptr() != parameter.data_ptr():  # of bfloat16
        parameter.copy_(updated)


def _update_float(tensor: AdamwTensor, factors: _Factors) -> None:
    flat = [t.view(-1) for t in (tensor.parameter, tensor.gradient, tensor.exp_avg, tensor.exp_avg_sq)]
    for parameter, gradient, exp_avg, exp_avg_sq in zip(*(torch.split(t, CHUNK) for t in flat), strict=True):
        _update_values(parameter, gradient, exp_avg, exp_avg_sq, factors)


def _update_blockwise(
    tensor: AdamwTensor, exp_avg_absmax: Tensor, exp_avg_sq_absmax: Tensor, factors: _Factors, block_size: int
) -> None:
    elements = [t.view(-1) for t in (tensor.parameter, tensor.gradient, tensor.exp_avg, tensor.exp_avg_sq)]
    chunks = [torch.split(t, CHUNK) for t in elements]
    chunks += [torch.split(t, CHUNK // block_size) for t in (exp_avg_absmax, exp_avg_sq_absmax)]
    for parameter, gradient, codes, square_codes, absmax, square_absmax in zip(*chunks, strict=True):
        exp_avg = _decode(codes, absmax, block_size, signed=True)
        exp_avg_sq = _decode(square_codes, square_absmax, block_size, signed=False)
        _update_values(parameter, gradient, exp_avg, exp_avg_sq, factors)
        _encode(exp_avg, codes, absmax, block_size, signed=True)
        _encode(exp_avg_sq, square_codes, square_absmax, block_size, signed=False)


@cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # levels first needed under inference_mode must serve training too
        return torch.tensor(dynamic_map_levels(signed=signed), dtype=torch.float32, device=device)


def _decode(codes: Tensor, absmax: Tensor, block_size: int, *, signed: bool) -> Tensor:
    """Return the values of flat codes."""
    values = torch.index_select(_levels(signed, codes.device), 0, codes.int())
    return (to_blocks(values, block_size) * absmax[:, None]).view(-1)[: codes.numel()]


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, block_size: int, *, signed: bool) -> None:
    """Write the codes and absmax of flat values."""
    blocks = to_blocks(values, block_size)
    absmax.copy_(blocks.abs().amax(dim=1))
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    ranks = torch.bucketize(scaled, midpoints(_levels(signed, codes.device)), out_int32=True)
    ranks[~absmax.isfinite()] = EXP_AVG_ZERO if signed else EXP_AVG_SQ_ZERO
    codes.copy_(ranks.view(-1)[: codes.numel()])


def _squares_of_pieces(gradients: Sequence[Tensor]) -> Iterator[tuple[int, float]]:
    """Yield the index of the gradient and the sum of squares for each piece, in order."""
    for pieces in _batches(gradients):
        rows = torch.stack([piece for _, piece in pieces]).double().view(len(pieces), PIECE // LANES, LANES)
        lanes = torch.zeros(len(pieces), LANES, dtype=torch.float64, device=rows.device)
        for row in rows.square_().unbind(dim=1):
            lanes += row
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        yield from zip([index for index, _ in pieces], lanes[:, 0].tolist(), strict=True)


def _batches(gradients: Sequence[Tensor]) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield lists of (index of the gradient, (PIECE,) elements of it), the last piece of each filled up with zeros."""
    pieces: list[tuple[int, Tensor]] = []
    for index, gradient in enumerate(gradients):
        for piece in torch.split(gradient.detach().reshape(-1), PIECE):
            missing = PIECE - piece.numel()
            pieces.append((index, F.pad(piece, (0, missing)) if missing else piece))
            if len(pieces) == PIECES_AT_ONCE:
                yield pieces
                pieces = []
    if pieces:
        yield pieces
