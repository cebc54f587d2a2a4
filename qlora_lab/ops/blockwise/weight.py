"""A quantized weight as the ops take it."""

from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lab.errors import ShapeError
from qlora_lab.ops.blockwise.checks import (
    check_block_size,
    check_dtype,
    check_nested,
    check_packed,
    check_same_device,
    dtype_name,
)


class PackedWeight(NamedTuple):
    """The parts of a quantized matrix, in the order in which every op takes them.

    Attributes:
        packed: uint8 codes of the weight, row by row.
        absmax: (blocks,) float32, or uint8 codes where it was quantized again.
        nested_absmax: (nested blocks,) float32 of the second quantization, or None.
        offset: 0-d float32 of the second quantization, or None.
        format: a name of `ops.formats.FORMATS`.
        block_size: weights per block.
        nested_block_size: absmax values per second-level block; not used without one.
        out_features, in_features: the weight's shape.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    format: str
    block_size: int
    nested_block_size: int
    out_features: int
    in_features: int

    def check(self) -> None:
        """Raise ConfigError or ShapeError unless the parts belong together."""
        check_block_size("block_size", self.block_size)
        if self.out_features < 0 or self.in_features < 0:
            raise ShapeError(f"a weight cannot have a shape of ({self.out_features}, {self.in_features})")
        check_packed(self.packed, self.absmax, self.format, self.block_size, self.out_features * self.in_features)
        if (self.nested_absmax is None) != (self.offset is None):
            raise ShapeError("nested_absmax and offset belong together; got only one of them")
        if self.nested_absmax is not None and self.offset is not None:
            check_block_size("nested_block_size", self.nested_block_size)
            check_nested(self.absmax, self.nested_absmax, self.offset, self.nested_block_size)
        elif self.absmax.dtype != torch.float32:
            raise ShapeError(
                "absmax must be float32 unless it was quantized again; got "
                f"{dtype_name(self.absmax.dtype)} without nested_absmax"
            )
        check_same_device("packed", self.packed, "absmax", self.absmax)

    def check_linear(self, x: Tensor, bias: Tensor | None) -> None:
        """Raise ConfigError or ShapeError unless the parts and `bias` make a linear layer that can take `x`."""
        self.check()
        check_input("x", x, self.in_features)
        check_same_device("x", x, "the weight", self.packed)
        if bias is None:
            return
        if bias.shape != (self.out_features,):
            raise ShapeError(f"bias must have shape ({self.out_features},); got {tuple(bias.shape)}")
        check_dtype("the dtype of bias", bias.dtype)
        check_same_device("bias", bias, "the weight", self.packed)

    def check_out(self, out: Tensor) -> None:
        """Raise ConfigError or ShapeError unless the weight can be expanded into `out`."""
        check_dtype("the dtype of out", out.dtype)
        if out.shape != (self.out_features, self.in_features) or not out.is_contiguous():
            raise ShapeError(
                f"out must be contiguous of shape ({self.out_features}, {self.in_features}); got {tuple(out.shape)}"
            )
        check_same_device("out", out, "the weight", self.packed)


def check_input(name: str, x: Tensor, columns: int) -> None:
    """Raise ConfigError or ShapeError unless x, or a gradient, has rows of so many columns and a dtype of a product."""
    check_dtype(f"the dtype of {name}", x.dtype)
    if x.shape[-1:] != (columns,):
        raise ShapeError(f"{name} must have {columns} features in its last dimension; got shape {tuple(x.shape)}")


# The same parts in the language of op schemas.
WEIGHT_SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str fmt, int block_size,"
    " int nested_block_size, int out_features, int in_features"
)
WEIGHT_PARTS = len(PackedWeight._fields)
WEIGHT_TENSORS = 4  # the first of them; the others are its layout
