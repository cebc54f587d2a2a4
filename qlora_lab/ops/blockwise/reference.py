"""Blockwise quantization in pure torch: the arithmetic that native kernels must reproduce, and the fallback.

A weight is flattened row by row and cut into blocks of `block_size`; the last block may be shorter. Each block
keeps its largest magnitude (absmax), and each weight the code of the level nearest to weight / absmax.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.ops.blockwise.tables import cell_of, decode_table, dynamic_map, encode_table, midpoints
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.formats import Format, format_named

SMALLEST_ABSMAX = 1e-38  # keeps the reciprocal of an all-zero block finite
CHUNK = 2**17  # weights quantized at once: whole blocks, and temporaries that stay in cache
DYNAMIC_GRID = 65535  # steps from -1 to 1 onto which double quantization rounds first


def quantize_blockwise(weight: Tensor, fmt: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (packed, absmax) of a weight of any shape; see `op.quantize_blockwise`."""
    flat = weight.reshape(-1)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=weight.device)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=weight.device)
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK]
        blocks = to_blocks(piece.float(), block_size)
        piece_absmax = blocks.abs().amax(dim=1)
        absmax[start // block_size :][: len(piece_absmax)] = piece_absmax
        piece_codes = encode(scale_blocks(blocks, piece_absmax).view(-1), format_named(fmt))
        codes[start : start + CHUNK] = piece_codes[: len(piece)]
    return pack(codes, format_named(fmt)), absmax


def dequantize_weight(*parts: Any) -> Tensor:
    """Return (out_features, in_features) of `PackedWeight(*parts[:-1])`, in the dtype parts[-1]."""
    weight, dtype = PackedWeight(*parts[:-1]), parts[-1]
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None:
        absmax = dequantize_absmax(absmax, weight.nested_absmax, weight.offset, weight.nested_block_size)
    values = unpack(weight.packed, format_named(weight.format))
    numel = weight.out_features * weight.in_features
    whole = numel - numel % weight.block_size
    values[:whole].view(-1, weight.block_size).mul_(absmax[: whole // weight.block_size, None])
    if whole < numel:
        values[whole:].mul_(absmax[-1])
    return values[:numel].to(dtype).view(weight.out_features, weight.in_features)


def dequantize_weight_into(*parts: Any) -> None:
    """Write (out_features, in_features) of `PackedWeight(*parts[:-1])` into the tensor parts[-1]."""
    *weight, out = parts
    out.copy_(dequantize_weight(*weight, out.dtype))


def quantize_absmax(absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (codes, nested_absmax); see `op.quantize_absmax`."""
    blocks = to_blocks(absmax - offset, block_size)
    nested_absmax = blocks.abs().amax(dim=1)
    # bitsandbytes finds codes in a table over this grid, so the grid is part of the format.
    steps = ((scale_blocks(blocks, nested_absmax) + 1.0) * 0.5 * DYNAMIC_GRID + 0.5).floor()
    on_grid = 2.0 * steps / DYNAMIC_GRID - 1.0
    codes = torch.bucketize(on_grid, midpoints(dynamic_map(absmax.device)), out_int32=True)
    codes[nested_absmax == 0] = 0
    return codes.view(-1)[: absmax.numel()].to(torch.uint8), nested_absmax


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Return absmax as (blocks,) float32; see `op.dequantize_absmax`."""
    levels = torch.index_select(dynamic_map(codes.device), 0, codes.int())
    blocks = to_blocks(levels, block_size) * nested_absmax[:, None]
    return blocks.view(-1)[: codes.numel()] + offset


def quantized_linear(x: Tensor, *parts: Any) -> Tensor:
    """Return x @ weight^T + bias in x's dtype, of `PackedWeight(*parts[:-1])` and the bias parts[-1]."""
    *weight, bias = parts
    dense = dequantize_weight(*weight, x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # x's dtype is the compute dtype, whatever surrounds us
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def quantized_linear_grad_input(grad_output: Tensor, *weight: Any) -> Tensor:
    """Return grad_output @ weight, the gradient of `quantized_linear` with respect to x."""
    dense = dequantize_weight(*weight, grad_output.dtype)
    with torch.autocast(grad_output.device.type, enabled=False):
        return torch.matmul(grad_output, dense)


def to_blocks(flat: Tensor, block_size: int) -> Tensor:
    """Return a flat tensor as (blocks, block_size), the last block filled up with zeros."""
    missing = -flat.numel() % block_size
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, block_size)


def scale_blocks(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Divide each block by its absmax: into [-1, 1], and zeros where the block is not finite.

    The reciprocal is rounded before it multiplies, as every implementation of these formats does; a division
    would give other codes at ties.
    """
    reciprocal = 1.0 / absmax.clamp(min=SMALLEST_ABSMAX)
    return (blocks * reciprocal[:, None]).clamp_(-1.0, 1.0).nan_to_num_(0.0)


def encode(scaled: Tensor, fmt: Format) -> Tensor:
    """Return the code of each value in [-1, 1], flat uint8: of the level whose rank is the midpoints below it."""
    table = encode_table(fmt, scaled.device)
    cells = cell_of(scaled)
    below = torch.index_select(table.code_below, 0, cells)
    above = torch.index_select(table.code_above, 0, cells)
    return torch.where(scaled > torch.index_select(table.midpoint, 0, cells), above, below)


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """Return codes as bytes; an odd last 4-bit code shares its byte with the code of zero."""
    if fmt.bits == 8:
        return codes.contiguous()
    if codes.numel() % 2:
        zero = encode(torch.zeros(1, device=codes.device), fmt)
        codes = torch.cat((codes, zero))
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: Tensor, fmt: Format) -> Tensor:
    """Return the level of every code in `packed`, flat float32."""
    table = decode_table(fmt, packed.device)
    # All weights of a byte are fetched as one integer of their width: one lookup a byte.
    whole = table.view(torch.int32) if fmt.bits == 8 else table.view(torch.int64)
    return torch.index_select(whole.view(-1), 0, packed.view(-1).int()).view(torch.float32)
