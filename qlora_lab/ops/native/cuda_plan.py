"""Which CUDA kernel multiplies with a quantized weight, and in what pieces: pure functions of the shape and the GPU."""

from dataclasses import dataclass
from typing import Literal

FEW_ROWS = 16  # QLK_CUDA_FEW_ROWS of kernels/include/qlk_cuda.h
TILE_ROWS = 64  # QLK_CUDA_TILE_ROWS
TILE_WEIGHTS = 32  # of a row that one lane takes at once: rows must be a multiple of it
SINGLE_ROWS = 4  # up to here the tensor cores' tiles of 8 rows would be half empty
GEMM_TILE = 128  # rows and columns of the output that one multiprocessor takes in a dense product
L2_SHARE = 0.4  # of the cache for decoded weights; the activations need the rest


@dataclass(frozen=True)
class Device:
    """What the choice depends on.

    Attributes:
        multiprocessors: of the GPU.
        l2_bytes: its second-level cache.
        capability: 90 for 9.0.
        concurrent_managed_access: whether unified memory moves by pages, so that paged states can be taken back.
    """

    multiprocessors: int
    l2_bytes: int
    capability: int
    concurrent_managed_access: bool = True


@dataclass(frozen=True)
class ProductPlan:
    """How to multiply.

    Attributes:
        kernel: `few_rows` and `tiles` decode inside the product; `panels` decodes part of the weight, then multiplies
            densely.
        panels: (first, count) of the weight's rows or columns that are decoded together; empty for the others.
    """

    kernel: Literal["few_rows", "tiles", "panels"]
    panels: tuple[tuple[int, int], ...] = ()


def plan_product(
    rows: int, out_features: int, in_features: int, dtype_bytes: int, bits: int, device: Device
) -> ProductPlan:
    """Choose how to compute x @ weight^T.

    A product with few rows is bound by reading the codes, so it decodes them on the way. With many rows the tensor
    cores are the bound, and a dense product in pieces that stay in the second-level cache costs no more memory traffic.

    Args:
        rows: of x.
        out_features, in_features: of the weight.
        dtype_bytes: of an element of x.
        bits: of a weight's code.
        device: the GPU.
    """
    whole_lanes = in_features > 0 and in_features % TILE_WEIGHTS == 0
    fits_tiles = dtype_bytes == 2 and bits == 4 and whole_lanes and device.capability >= 80
    if rows <= SINGLE_ROWS or (rows <= FEW_ROWS and not fits_tiles):
        return ProductPlan("few_rows")
    if rows <= TILE_ROWS and fits_tiles:
        return ProductPlan("tiles")
    return ProductPlan("panels", split_panels(rows, out_features, in_features * dtype_bytes, device))


def plan_grad_input(rows: int, out_features: int, in_features: int, dtype_bytes: int, device: Device) -> ProductPlan:
    """Choose the pieces of grad_output @ weight: columns of the weight, so that no piece of the result is summed up."""
    return ProductPlan("panels", split_panels(rows, in_features, out_features * dtype_bytes, device))


def split_panels(rows: int, count: int, bytes_each: int, device: Device) -> tuple[tuple[int, int], ...]:
    """Split `count` rows (or columns) of a weight into panels whose decoded form stays in the second-level cache.

    Two panels share the cache, one being decoded while the other is multiplied. A panel is never so small that its
    product leaves multiprocessors idle; panels are multiples of a GEMM tile, and as equal as that allows.

    Returns:
        (first, count) of each panel, in order; one panel if the whole weight fits.
    """
    budget = int(device.l2_bytes * L2_SHARE)
    if count * bytes_each <= budget:
        return ((0, count),)
    row_tiles = -(-rows // GEMM_TILE)
    smallest = GEMM_TILE * -(-device.multiprocessors // row_tiles)
    fitting = max(budget // 2 // bytes_each // GEMM_TILE * GEMM_TILE, GEMM_TILE)
    panels = min(-(-count // fitting), max(count // smallest, 1))
    size = -(-count // panels)
    size = -(-size // GEMM_TILE) * GEMM_TILE
    return tuple((first, min(size, count - first)) for first in range(0, count, size))
