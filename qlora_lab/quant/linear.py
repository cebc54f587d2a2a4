"""A linear layer whose frozen weight is stored quantized."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lab.errors import ShapeError
from qlora_lab.ops.blockwise.checks import check_block_size, check_dtype, dtype_name
from qlora_lab.ops.blockwise.op import (
    dequantize_weight,
    quantize_absmax,
    quantize_blockwise,
    quantized_linear,
)
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.formats import format_named
from qlora_lab.ops.lora.op import lora_linear
from qlora_lab.quant.damage import check_magnitudes

STATISTICS = ("absmax", "nested_absmax", "offset")
BUFFERS = ("packed", *STATISTICS)


class QuantizedLinear(nn.Module):
    """y = x @ weight^T + bias with a frozen weight in `format`; gradients flow to x and the bias.

    The input is cast to `compute_dtype`, the weight is expanded to it for each product, and the result is cast
    back to the input's dtype. A new layer holds no weight yet (`device="meta"` takes no memory): fill it with
    `load_weight`, or build it with `from_linear`.

    Buffers: `packed` uint8 codes; `absmax`, float32 per block, or with `double_quant` uint8 codes that
    `nested_absmax` and `offset` complete. `.to(dtype)` leaves all of them as they are.

    Raises:
        ConfigError: unknown format, block size or compute dtype.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        format: str,
        block_size: int,
        double_quant: bool,
        double_quant_block_size: int,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_block_size("block_size", block_size)
        check_block_size("double_quant_block_size", double_quant_block_size)
        check_dtype("compute_dtype", compute_dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.block_size = block_size
        self.double_quant = double_quant
        self.double_quant_block_size = double_quant_block_size
        self.compute_dtype = compute_dtype
        self._dense_weight: Tensor | None = None  # set only inside cached_weights

        numel = in_features * out_features
        blocks = -(-numel // block_size)
        nested_blocks = -(-blocks // double_quant_block_size)
        packed_bytes = format_named(format).packed_bytes(numel)
        absmax_dtype = torch.uint8 if double_quant else torch.float32
        nested_absmax = torch.empty(nested_blocks, dtype=torch.float32, device=device) if double_quant else None
        offset = torch.empty((), dtype=torch.float32, device=device) if double_quant else None
        self.register_buffer("packed", torch.empty(packed_bytes, dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.empty(blocks, dtype=absmax_dtype, device=device))
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("offset", offset)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, device=device)) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        format: str,
        block_size: int,
        double_quant: bool,
        double_quant_block_size: int,
        compute_dtype: torch.dtype,
    ) -> Self:
        """Quantize a linear layer's weight; the bias is shared with it as it is.

        Raises:
            ConfigError: unknown format, block size or dtype.
            ModelError: the weight holds NaN, infinite or absurd values.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
            double_quant_block_size=double_quant_block_size,
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer.load_weight(linear.weight)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def from_packed(cls, weight: PackedWeight, *, compute_dtype: torch.dtype) -> Self:
        """Hold a weight that is quantized already, sharing its tensors; without a bias.

        Raises:
            ConfigError: unknown format, block size or dtype.
            ShapeError: parts that do not belong together.
        """
        weight.check()
        layer = cls(
            weight.in_features,
            weight.out_features,
            bias=False,
            format=weight.format,
            block_size=weight.block_size,
            double_quant=weight.nested_absmax is not None,
            double_quant_block_size=weight.nested_block_size,
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer.packed, layer.absmax, layer.nested_absmax, layer.offset, *_ = weight
        return layer

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Quantize `weight` and make it this layer's, on the weight's device.

        Args:
            weight: (out_features, in_features); float32, bfloat16 or float16.

        Raises:
            ShapeError: of another shape.
            ModelError: it holds NaN, infinite or absurd values.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ShapeError(
                f"the weight must have shape ({self.out_features}, {self.in_features}); got {tuple(weight.shape)}"
            )
        packed, absmax = quantize_blockwise(weight, self.format, self.block_size)
        check_magnitudes(absmax)
        self.packed = packed
        if self.double_quant:
            self.absmax, self.nested_absmax, self.offset = quantize_absmax(absmax, self.double_quant_block_size)
        else:
            self.absmax = absmax

    @property
    def is_expanded(self) -> bool:
        """Whether a dense copy of the weight is kept at the moment; see `cached_weights`."""
        return self._dense_weight is not None

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight as the ops take it."""
        return PackedWeight(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.format,
            self.block_size,
            self.double_quant_block_size,
            self.out_features,
            self.in_features,
        )

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight the layer computes with: (out_features, in_features), by default in compute_dtype."""
        return dequantize_weight(self.packed_weight, dtype or self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """The shape and dtype of the weight without its values (on the meta device, so free of cost).

        Model code of transformers asks its layers for `weight.dtype` or initialises `weight` when it is missing
        from a checkpoint; for the values call `dequantize`.
        """
        return torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) in the dtype of x, (..., in_features)."""
        inputs = x.to(self.compute_dtype)
        if self._dense_weight is not None:
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            with torch.autocast(x.device.type, enabled=False):  # as the op does
                return F.linear(inputs, self._dense_weight, bias).to(x.dtype)
        return quantized_linear(inputs, self.packed_weight, self.bias).to(x.dtype)

    def with_adapter(
        self, x: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float, seed: int
    ) -> Tensor:
        """Return `forward` plus a LoRA product in the same pass; see `ops.lora.op.lora_linear`."""
        outputs = lora_linear(
            x.to(self.compute_dtype),
            self.packed_weight,
            self.bias,
            lora_A,
            lora_B,
            scaling=scaling,
            dropout=dropout,
            seed=seed,
        )
        return outputs.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, block_size={self.block_size}, double_quant={self.double_quant}, "
            f"compute_dtype={dtype_name(self.compute_dtype)}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep float32 statistics when it is cast: they are part of the weight."""
        before = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)
        for name, statistic in before.items():
            if statistic is not None and getattr(self, name).dtype != statistic.dtype:
                setattr(self, name, statistic.to(getattr(self, name).device))
        return self


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Keep every quantized layer's expanded weight while inside, so that it is expanded once.

    For generation and evaluation with frozen weights, where many short forwards would each expand everything;
    results are bit for bit those outside. Costs the memory of the whole unquantized model in compute_dtype
    (425 MB in float32 for the 106 M quantized weights of SmolLM2-135M); weights must not change inside.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    uncached = [layer for layer in layers if layer._dense_weight is None]
    try:
        for layer in uncached:
            layer._dense_weight = layer.dequantize()
        yield
    finally:
        for layer in uncached:
            layer._dense_weight = None
