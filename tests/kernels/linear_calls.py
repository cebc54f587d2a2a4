"""Random quantized weights, and the matrix products of the C library called with NaN-filled, guarded outputs."""

import ctypes
from ctypes import c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lab.ops.formats import FORMATS, dynamic_map_levels
from qlora_lab.ops.native.library import AdapterView, WeightView

OK, BAD_FORMAT, BAD_BLOCK_SIZE, BAD_DTYPE, BAD_SIZE, NULL_POINTER = range(6)
DTYPE_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GUARD = 64  # elements on either side of an output
GUARD_VALUE = 12345.0
UNIT, BFLOAT16_UNIT = 2.0**-24, 2.0**-8  # the largest relative error of rounding to float32, to bfloat16
NESTED_BLOCK = 256


@dataclass
class Weight:
    """Random codes and scales: `dense` is what they stand for, (out_features, in_features) float32."""

    view: WeightView
    dense: Tensor
    parts: tuple[Tensor | None, ...]  # keeps alive what the view points to


def random_weight(
    shape: tuple[int, int],
    fmt: str = "nf4",
    block_size: int = 64,
    *,
    nested: bool = False,
    seed: int = 0,
    odd_absmax: float | None = None,
) -> Weight:
    """Return a random weight; `odd_absmax` is the absmax of its second block, where it is not quantized again."""
    generator = torch.Generator().manual_seed(seed)
    numel, form = shape[0] * shape[1], FORMATS[fmt]
    blocks = -(-numel // block_size)
    packed = torch.randint(0, 256, (form.packed_bytes(numel),), dtype=torch.uint8, generator=generator)
    absmax = stored = torch.rand(blocks, generator=generator) + 0.1
    if odd_absmax is not None:
        absmax[1] = odd_absmax
    nested_absmax = offset = None
    if nested:
        stored = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        nested_absmax = torch.rand(-(-blocks // NESTED_BLOCK), generator=generator) * 0.5
        offset = torch.tensor([0.6])
        levels = torch.tensor(dynamic_map_levels(signed=True), dtype=torch.float32)
        absmax = levels[stored.long()] * nested_absmax.repeat_interleave(NESTED_BLOCK)[:blocks] + offset
    codes = packed if form.bits == 8 else torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    values = torch.tensor(form.values_by_code(), dtype=torch.float32)[codes[:numel].long()]
    dense = (values * absmax.repeat_interleave(block_size)[:numel]).view(shape)
    view = WeightView(
        *(pointer(packed), pointer(stored), pointer(nested_absmax), pointer(offset)),
        *(shape[0], shape[1], block_size, NESTED_BLOCK if nested else 0),
        list(FORMATS).index(fmt),
    )
    return Weight(view, dense, (packed, stored, nested_absmax, offset))


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Output:
    """A matrix full of NaN between guards."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        numel = shape[0] * shape[1]
        self.whole = torch.full((numel + 2 * GUARD,), GUARD_VALUE).to(dtype)
        self.guard = self.whole[0].item()
        self.matrix = self.whole[GUARD : GUARD + numel].view(shape)
        self.matrix.fill_(float("nan"))

    def checked(self) -> Tensor:
        """Return the matrix; whatever was written beside it fails the test."""
        assert (self.whole[:GUARD] == self.guard).all() and (self.whole[-GUARD:] == self.guard).all()
        return self.matrix


def linear(library: ctypes.CDLL, x: Tensor, weight: Weight, bias: Tensor | None = None, threads: int = 1) -> Tensor:
    out = Output((x.shape[0], weight.dense.shape[0]), x.dtype)
    status = library.qlk_cpu_linear(
        *(c_void_p(pointer(x)), DTYPE_NUMBER[x.dtype], ctypes.c_int64(x.shape[0]), ctypes.byref(weight.view)),
        *(c_void_p(pointer(bias)), c_void_p(pointer(out.matrix)), threads),
    )
    assert status == OK
    return out.checked()


def linear_grad_input(library: ctypes.CDLL, grad_output: Tensor, weight: Weight, threads: int = 1) -> Tensor:
    out = Output((grad_output.shape[0], weight.dense.shape[1]), grad_output.dtype)
    status = library.qlk_cpu_linear_grad_input(
        *(c_void_p(pointer(grad_output)), DTYPE_NUMBER[grad_output.dtype], ctypes.c_int64(grad_output.shape[0])),
        *(ctypes.byref(weight.view), c_void_p(pointer(out.matrix)), threads),
    )
    assert status == OK
    return out.checked()


@dataclass
class Adapter:
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float
    seed: int

    @property
    def view(self) -> AdapterView:
        rank = self.lora_A.shape[0]
        return AdapterView(pointer(self.lora_A), pointer(self.lora_B), rank, self.scaling, self.dropout, self.seed)


def lora_linear(
    library: ctypes.CDLL, x: Tensor, weight: Weight, bias: Tensor | None, adapter: Adapter, threads: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (out, low)."""
    out = Output((x.shape[0], weight.dense.shape[0]), x.dtype)
    low = Output((x.shape[0], adapter.lora_A.shape[0]))
    status = library.qlk_cpu_lora_linear(
        *(c_void_p(pointer(x)), DTYPE_NUMBER[x.dtype], ctypes.c_int64(x.shape[0]), ctypes.byref(weight.view)),
        *(c_void_p(pointer(bias)), ctypes.byref(adapter.view), c_void_p(pointer(low.matrix))),
        *(c_void_p(pointer(out.matrix)), threads),
    )
    assert status == OK
    return out.checked(), low.checked()


def lora_linear_backward(
    library: ctypes.CDLL,
    grad_output: Tensor,
    x: Tensor,
    low: Tensor,
    weight: Weight,
    adapter: Adapter,
    threads: int = 1,
    needs_input: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of x (None if it is not asked for), lora_A and lora_B."""
    grad_input = Output((x.shape[0], x.shape[1]), x.dtype) if needs_input else None
    grad_A = Output((adapter.lora_A.shape[0], adapter.lora_A.shape[1]))
    grad_B = Output((adapter.lora_B.shape[0], adapter.lora_B.shape[1]))
    status = library.qlk_cpu_lora_linear_backward(
        *(c_void_p(pointer(grad_output)), c_void_p(pointer(x)), c_void_p(pointer(low)), DTYPE_NUMBER[x.dtype]),
        *(ctypes.c_int64(x.shape[0]), ctypes.byref(weight.view), ctypes.byref(adapter.view)),
        c_void_p(pointer(grad_input.matrix) if grad_input else None),
        *(c_void_p(pointer(grad_A.matrix)), c_void_p(pointer(grad_B.matrix)), threads),
    )
    assert status == OK
    return grad_input.checked() if grad_input else None, grad_A.checked(), grad_B.checked()


def multiplied(library: ctypes.CDLL, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight that a product of `dtype` meets, in float64: rounded where units multiply bfloat16."""
    library.qlk_cpu_isa.restype = ctypes.c_char_p
    rounded = dtype == torch.bfloat16 and library.qlk_cpu_isa() == b"avx512_bf16"
    return (weight.dense.bfloat16() if rounded else weight.dense).double()


def assert_within(actual: Tensor, expected: Tensor, magnitude: Tensor, roundings: int) -> None:
    """Check a sum of products, `magnitude` being the sum of their absolute values.

    Each term of the sum passes through at most `roundings` float32 operations, whatever their order, so the error is
    at most gamma * magnitude with gamma = n u / (1 - n u) (Higham 2002, section 3.1). A bfloat16 result is rounded
    once more.
    """
    gamma = roundings * UNIT / (1 - roundings * UNIT)
    bound = gamma * magnitude
    if actual.dtype == torch.bfloat16:
        bound = bound + BFLOAT16_UNIT * (expected.abs() + bound) * (1 + UNIT)
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"error {error.max():.3g} beyond the bound by {(error - bound).max():.3g}"
