"""The ops for CUDA tensors, calling the C library of kernels/cuda through ctypes.

Arguments were checked by the functions in ops/blockwise/op.py and ops/lora/op.py; here, that all lie on one device: a
kernel that reads memory of another fails every later call of the process. Products with many rows are torch's, on
panels of the weight that were decoded into the second-level cache.
"""

from collections.abc import Callable
from ctypes import byref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_lab.errors import ShapeError
from qlora_lab.ops.blockwise.weight import WEIGHT_PARTS, PackedWeight
from qlora_lab.ops.formats import format_named
from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES, bias_like, rows_of
from qlora_lab.ops.native.cuda_library import CudaAdapterView, CudaLibrary
from qlora_lab.ops.native.cuda_low_rank import Added, FusedLowRank, LowRank, TorchLowRank
from qlora_lab.ops.native.cuda_plan import Device, ProductPlan, plan_grad_input, plan_low_rank, plan_product
from qlora_lab.ops.native.cuda_streams import Streams
from qlora_lab.ops.native.library import WeightView


class CudaOps:
    """One method per op, named and called as the op is."""

    def __init__(self, library: CudaLibrary, streams: Streams) -> None:
        self._library = library
        self._streams = streams
        self._devices: dict[int, Device] = {}

    def quantize_blockwise(self, weight: Tensor, fmt: str, block_size: int) -> tuple[Tensor, Tensor]:
        source = weight.contiguous()
        numel = source.numel()
        packed = source.new_empty(format_named(fmt).packed_bytes(numel), dtype=torch.uint8)
        absmax = source.new_empty(-(-numel // block_size), dtype=torch.float32)
        with self._streams.queue(source.device) as stream:
            self._library.qlk_cuda_quantize(
                *(source.data_ptr(), DTYPE_CODES[source.dtype], numel, self._library.format_index[fmt], block_size),
                *(packed.data_ptr(), absmax.data_ptr(), stream),
            )
        return packed, absmax

    def dequantize_weight(self, *parts: Any) -> Tensor:
        *weight, dtype = parts
        out = weight[0].new_empty(weight[-2:], dtype=dtype)
        self.dequantize_weight_into(*weight, out)
        return out

    def dequantize_weight_into(self, *parts: Any) -> None:
        *weight, out = parts
        view = self._view(weight, out.device)
        with self._streams.queue(out.device) as stream:
            self._decode(view, (0, view.out_features), (0, view.in_features), out, stream)

    def quantize_absmax(self, absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        source = absmax.contiguous()
        _check_device(source.device, offset=offset)
        blocks = source.numel()
        codes = source.new_empty(blocks, dtype=torch.uint8)
        nested_absmax = source.new_empty(-(-blocks // block_size))
        with self._streams.queue(source.device) as stream:
            self._library.qlk_cuda_quantize_absmax(
                *(source.data_ptr(), blocks, block_size, offset.data_ptr()),
                *(codes.data_ptr(), nested_absmax.data_ptr(), stream),
            )
        return codes, nested_absmax

    def dequantize_absmax(self, codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
        source, scales = codes.contiguous(), nested_absmax.contiguous()
        _check_device(source.device, nested_absmax=scales, offset=offset)
        absmax = scales.new_empty(source.numel())
        with self._streams.queue(source.device) as stream:
            self._library.qlk_cuda_dequantize_absmax(
                *(source.data_ptr(), scales.data_ptr(), offset.data_ptr(), source.numel(), block_size),
                *(absmax.data_ptr(), stream),
            )
        return absmax

    def quantized_linear(self, x: Tensor, *parts: Any) -> Tensor:
        *weight, bias = parts
        return self._product(x.contiguous(), self._view(weight, x.device), bias, None, None)

    def quantized_linear_grad_input(self, grad_output: Tensor, *weight: Any) -> Tensor:
        return self._grad_input(grad_output.contiguous(), self._view(weight, grad_output.device), None)

    def _grad_input(self, gradient: Tensor, view: WeightView, added: Added | None) -> Tensor:
        flat = gradient.view(-1, view.out_features)
        grad_x = gradient.new_empty((*gradient.shape[:-1], view.in_features))
        plan = plan_grad_input(
            len(flat), view.out_features, view.in_features, gradient.element_size(), self._device(gradient)
        )

        result = grad_x.view(len(flat), view.in_features)

        def multiply(dense: Tensor, part: Tensor, _first: int) -> None:
            torch.mm(flat, dense, out=part)

        if grad_x.numel():
            self._in_panels(plan, view, result, by_rows=False, multiply=multiply, added=added)
        return grad_x

    def lora_linear(self, x: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
        weight, (bias, lora_A, lora_B, scaling, dropout, seed) = parts[:WEIGHT_PARTS], parts[WEIGHT_PARTS:]
        source, view = x.contiguous(), self._view(weight, x.device)
        A, B = lora_A.contiguous(), lora_B.contiguous()
        _check_device(x.device, lora_A=A, lora_B=B)
        if self._plan(source, view).kernel != "panels":
            dtype = DTYPE_CODES[A.dtype]
            adapter = CudaAdapterView(A.data_ptr(), B.data_ptr(), len(A), scaling, dropout, seed, dtype)
            low = source.new_empty(rows_of(source), len(A), dtype=torch.float32)
            with self._streams.queue(source.device) as stream:
                self._library.qlk_cuda_lora_down(
                    *(source.data_ptr(), DTYPE_CODES[source.dtype], rows_of(source), view.in_features),
                    *(byref(adapter), low.data_ptr(), stream),
                )
            return self._product(source, view, bias, adapter, low), low
        with torch.autocast(x.device.type, enabled=False):
            down, up = A.to(x.dtype), B.to(x.dtype).T
            products = self._low_rank(source.view(rows_of(source), view.in_features), len(A), dropout, seed)
            low, rounded = products.down(down)
            out = self._product(
                *(source, view, bias, None, None),
                lambda part, first, count: part.addmm_(rounded, up[:, first : first + count], alpha=scaling),
            )
        return out, low

    def lora_linear_backward(self, grad_output: Tensor, x: Tensor, low: Tensor, *parts: Any) -> tuple[Tensor, ...]:
        weight, (lora_A, lora_B, scaling, dropout, seed, needs_grad_x) = parts[:WEIGHT_PARTS], parts[WEIGHT_PARTS:]
        dtype, view = x.dtype, self._view(weight, x.device)
        _check_device(x.device, grad_output=grad_output, lora_A=lora_A, lora_B=lora_B)
        with torch.autocast(x.device.type, enabled=False):
            gradient = grad_output.contiguous().view(-1, view.out_features)
            grad_low = _scaled_product(gradient, lora_B.to(dtype), scaling)
            grad_B = _scaled_product(gradient.T, low.to(dtype), scaling).to(lora_B.dtype)
            products = self._low_rank(x.contiguous().view(len(gradient), view.in_features), len(lora_A), dropout, seed)
            grad_A = products.grad_A(grad_low, lora_A.dtype)
            if not needs_grad_x:
                return x.new_empty(0), grad_A, grad_B
            grad_x = products.grad_x(partial(self._grad_input, gradient, view), grad_low, lora_A.contiguous().to(dtype))
        return grad_x.view(x.shape), grad_A, grad_B

    def _low_rank(self, x: Tensor, rank: int, dropout: float, seed: int) -> LowRank:
        """Return the low-rank products of x (rows, in_features)."""
        rows, in_features = x.shape
        plan = plan_low_rank(rows, in_features, rank, x.element_size(), dropout, self._device(x))
        if plan.kernel == "fused":
            return FusedLowRank(self._library, self._streams, x, rank, dropout, seed, plan)
        return TorchLowRank(
            x, None if dropout == 0.0 else lambda values, added: self.drop(values, dropout, seed, added)
        )

    def drop(self, x: Tensor, share: float, seed: int, added: Tensor | None = None) -> Tensor:
        """Return `added` + `ops.lora.dropout.drop(x, share, seed)`; x itself if there is nothing to do."""
        if share == 0.0 and added is None:
            return x
        out = torch.empty_like(x)
        with self._streams.queue(x.device) as stream:
            self._library.qlk_cuda_drop(
                *(x.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), share, seed),
                *(None if added is None else added.data_ptr(), out.data_ptr(), stream),
            )
        return out

    def _product(
        self,
        x: Tensor,
        view: WeightView,
        bias: Tensor | None,
        adapter: CudaAdapterView | None,
        low: Tensor | None,
        added: Added | None = None,
    ) -> Tensor:
        """Return x @ weight^T + bias, with the adapter where a kernel decodes inside the product, else with `added`."""
        _check_device(x.device, bias=bias)
        out = x.new_empty((*x.shape[:-1], view.out_features))
        shift, plan = bias_like(bias, x), self._plan(x, view)
        if not out.numel():
            return out
        if plan.kernel != "panels":
            kernel = getattr(self._library, f"qlk_cuda_linear_{plan.kernel}")
            with self._streams.queue(x.device) as stream:
                kernel(
                    *(x.data_ptr(), DTYPE_CODES[x.dtype], rows_of(x), byref(view)),
                    *(None if shift is None else shift.data_ptr(), None if adapter is None else byref(adapter)),
                    *(None if low is None else low.data_ptr(), out.data_ptr(), stream),
                )
            return out
        rows = rows_of(x)
        flat, result = x.view(rows, view.in_features), out.view(rows, view.out_features)

        def multiply(dense: Tensor, part: Tensor, first: int) -> None:
            if shift is None:
                torch.mm(flat, dense.T, out=part)
            else:
                torch.addmm(shift[first : first + part.shape[1]], flat, dense.T, out=part)

        with torch.autocast(x.device.type, enabled=False):
            self._in_panels(plan, view, result, by_rows=True, multiply=multiply, added=added)
        return out

    def _in_panels(
        self,
        plan: ProductPlan,
        view: WeightView,
        result: Tensor,
        *,
        by_rows: bool,
        multiply: Callable[[Tensor, Tensor, int], None],
        added: Added | None,
    ) -> None:
        """Call multiply(dense panel, its columns of `result`, the first one's number) for each panel.

        The next one is decoded meanwhile.
        """
        with self._streams.queue(result.device):
            other = view.in_features if by_rows else view.out_features
            largest = max(count for _, count in plan.panels)
            buffers = [result.new_empty(largest * other) for _ in plan.panels[:2]]
            ahead = self._streams.ahead(result.device, len(plan.panels))

            def decode(panel: int) -> Tensor:
                first, count = plan.panels[panel]
                rows, columns = ((first, count), (0, other)) if by_rows else ((0, other), (first, count))
                dense = buffers[panel % 2][: rows[1] * columns[1]].view(rows[1], columns[1])
                with ahead.decoding(panel) as stream:
                    self._decode(view, rows, columns, dense, stream)
                return dense

            try:
                following = decode(0)
                for panel, (first, count) in enumerate(plan.panels):
                    dense = following
                    if panel + 1 < len(plan.panels):
                        following = decode(panel + 1)
                    ahead.decoded(panel)
                    part = result[:, first : first + count]
                    multiply(dense, part, first)
                    ahead.multiplied(panel)
                    if added is not None:
                        added(part, first, count)
            except BaseException:
                ahead.finish()  # a product that failed leaves its buffers to others while the next panel is decoded
                raise

    def _decode(
        self, view: WeightView, rows: tuple[int, int], columns: tuple[int, int], out: Tensor, stream: int
    ) -> None:
        self._library.qlk_cuda_dequantize(byref(view), DTYPE_CODES[out.dtype], *rows, *columns, out.data_ptr(), stream)

    def _plan(self, x: Tensor, view: WeightView) -> ProductPlan:
        bits = format_named(view.name).bits
        plan = plan_product(rows_of(x), view.out_features, view.in_features, x.element_size(), bits, self._device(x))
        if plan.kernel == "tiles" and (x.data_ptr() % 16 or view.packed % 16):  # a slice of a larger tensor
            return plan_product(rows_of(x), view.out_features, view.in_features, 4, bits, self._device(x))
        return plan

    def _device(self, tensor: Tensor) -> Device:
        index = tensor.get_device()
        if index not in self._devices:
            self._devices[index] = self._library.device(max(index, 0))
        return self._devices[index]

    def _view(self, parts: Any, device: torch.device) -> WeightView:
        """Return a weight of this device as the library takes it; the view keeps the tensors it points into."""
        weight = PackedWeight(*parts)
        _check_device(
            device,
            packed=weight.packed,
            absmax=weight.absmax,
            nested_absmax=weight.nested_absmax,
            offset=weight.offset,
        )
        tensors = [None if part is None else part.contiguous() for part in weight[:4]]
        view = WeightView(
            *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
            *(weight.out_features, weight.in_features, weight.block_size, weight.nested_block_size),
            self._library.format_index[weight.format],
        )
        view.tensors, view.name = tensors, weight.format
        return view


def _check_device(device: torch.device, **parts: Tensor | None) -> None:
    """Raise ShapeError unless every part that is there lies on `device`."""
    for name, part in parts.items():
        if part is not None and part.device != device:
            raise ShapeError(f"{name} lies on {part.device}, and what it is used with on {device}; move it there")


def _scaled_product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Return factor * (left @ right), in one launch."""
    return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=factor)
