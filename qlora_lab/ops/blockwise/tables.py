"""Lookup tables of the blockwise reference, built once per format and device."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qlora_lab.ops.formats import Format, dynamic_map_levels

CELLS_PER_UNIT = 1024  # a power of two, and finer than the closest two midpoints of any format


@dataclass(frozen=True)
class EncodeTable:
    """Cuts [-1, 1] into cells so small that at most one midpoint falls in each.

    `cell_of` never decreases, so every midpoint of an earlier cell lies below x and none of a later cell does:
    only the midpoint in x's own cell has to be compared with x.

    Attributes:
        midpoint: (cells,) float32; the midpoint in the cell, infinity if there is none.
        code_below: (cells,) uint8; the code of values in the cell that are not above its midpoint.
        code_above: (cells,) uint8; the code of those above it.
    """

    midpoint: Tensor
    code_below: Tensor
    code_above: Tensor


def cell_of(x: Tensor) -> Tensor:
    """Return the cell of each x in [-1, 1], as int32."""
    return ((x + 1.0) * CELLS_PER_UNIT).int()


def midpoints(levels: Tensor) -> Tensor:
    """Return the values half way between ascending float32 levels, where rounding changes its mind."""
    return (levels[:-1] + levels[1:]) / 2


@cache
def encode_table(fmt: Format, device: torch.device) -> EncodeTable:
    """Return the table that turns scaled weights into codes of `fmt`."""
    with torch.inference_mode(False):  # a table first needed under inference_mode must serve training too
        thresholds = midpoints(torch.tensor(fmt.levels, dtype=torch.float32))
        cells = cell_of(thresholds)
        if cells.unique().numel() != cells.numel():
            raise AssertionError(f"two midpoints of {fmt.name} share a cell; raise CELLS_PER_UNIT")
        midpoint = torch.full((2 * CELLS_PER_UNIT + 1,), torch.inf)
        midpoint[cells] = thresholds
        codes = torch.tensor(fmt.codes, dtype=torch.uint8)
        all_cells = torch.arange(len(midpoint))
        code_below = codes[torch.bucketize(all_cells, cells)]  # ranked by the midpoints of earlier cells
        code_above = codes[torch.bucketize(all_cells, cells, right=True)]
        return EncodeTable(midpoint.to(device), code_below.to(device), code_above.to(device))


@cache
def decode_table(fmt: Format, device: torch.device) -> Tensor:
    """Return the values each byte stands for: (256, weights per byte) float32, the high half first."""
    with torch.inference_mode(False):
        values = torch.tensor(fmt.values_by_code(), dtype=torch.float32)
        bytes_ = torch.arange(256)
        codes = bytes_[:, None] if fmt.bits == 8 else torch.stack((bytes_ >> 4, bytes_ & 0x0F), dim=1)
        return values[codes].to(device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the levels that double quantization stores absmax in, on a device: (256,) float32."""
    with torch.inference_mode(False):
        return torch.tensor(dynamic_map_levels(signed=True), dtype=torch.float32, device=device)
