"""Which CUDA kernel multiplies with a quantized weight, and in what pieces: pure functions of the shape and the GPU."""

from dataclasses import dataclass
from typing import Literal

FEW_ROWS = 16  # QLK_CUDA_FEW_ROWS of kernels/include/qlk_cuda.h
TILE_ROWS = 64  # QLK_CUDA_TILE_ROWS
TILE_WEIGHTS = 32  # of a row that one lane takes at once: rows must be a multiple of it
SINGLE_ROWS = 4  # up to here the tensor cores' tiles of 8 rows would be half empty
GEMM_TILE = 128  # rows and columns of the output that one multiprocessor takes in a dense product
LOW_RANK_ROWS = 32  # QLK_CUDA_LOW_RANK_ROWS
LOW_RANK_COLUMNS = 64  # QLK_CUDA_LOW_RANK_COLUMNS
LOW_RANK_CHUNK = 64  # ranks for which x is read, and its dropout worked out, once
MOST_LOW_RANK = 4 * LOW_RANK_CHUNK
LOW_RANK_BLOCKS = 2  # of threads on a multiprocessor
LEAST_SPLIT = 512  # columns, or rows, of a split: two steps of the eight warps in a block, or four
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


@dataclass(frozen=True)
class LowRankPlan:
    """How to multiply dropout(x) with an adapter's narrow matrices.

    Attributes:
        kernel: `fused` drops elements while it reads x; `torch` multiplies x, or where there is dropout a copy of it.
        down_splits: pieces of x's columns that blocks of threads sum up apart, for dropout(x) @ lora_A^T; of `fused`.
        grad_splits: the same of its rows, for the gradient of lora_A.
    """

    kernel: Literal["fused", "torch"]
    down_splits: int = 0
    grad_splits: int = 0


def plan_low_rank(
    rows: int, in_features: int, rank: int, dtype_bytes: int, dropout: float, device: Device
) -> LowRankPlan:
    """Choose how to compute an adapter's low-rank products with dropout, where the weight is decoded in panels.

    Without dropout torch multiplies x as it is, which is one pass over x already. With it, a copy would be written and
    read again: three passes for one, and memory for another x. Above 64 ranks the kernels work the dropout out again
    for each 64, of an x that may still be in the cache: by reckoning, not measurement, twice that takes less time than
    the copy and four times somewhat more, which its memory is worth. The tensor cores have no float32.

    A split sums up part of the inner dimension, so that few rows (or columns) still occupy the GPU. Splits, too, are
    reckoned: as many as give each multiprocessor its blocks of threads, none so short that its sums cost more to write
    than its part of x to read. The same shape on the same GPU is always split alike, so results do not change.

    Args:
        rows, in_features: of x.
        rank: of the adapter.
        dtype_bytes: of an element of x.
        dropout: the share of elements that the adapter does not see.
        device: the GPU.
    """
    if dropout == 0.0 or dtype_bytes != 2 or rank > MOST_LOW_RANK or device.capability < 80:
        return LowRankPlan("torch")
    columns = LOW_RANK_COLUMNS if rank <= LOW_RANK_CHUNK // 2 else LOW_RANK_COLUMNS // 2
    return LowRankPlan(
        "fused",
        _splits(in_features, -(-rows // LOW_RANK_ROWS), device),
        _splits(rows, -(-in_features // columns), device),
    )


def _splits(inner: int, blocks: int, device: Device) -> int:
    wanted = -(-LOW_RANK_BLOCKS * device.multiprocessors // max(blocks, 1))
    return max(min(wanted, inner // LEAST_SPLIT), 1)


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
