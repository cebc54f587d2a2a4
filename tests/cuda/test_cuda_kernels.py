"""The CUDA kernels, emulated and on a GPU: the reference's bytes, and products within the rounding of their sums."""

import math
from collections import Counter
from collections.abc import Callable
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lab.ops.adamw.optimizer import AdamW, AdamwKernels
from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor, adamw_, gradient_norm
from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.lora import reference as lora
from qlora_lab.ops.lora.dropout import drop
from qlora_lab.ops.lora.op import as_kernels_take
from qlora_lab.ops.native.cuda_adamw import CudaAdamw
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_streams import Streams

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 7, 63, 64, 65, 1000, 4097, 9001)
every_format = pytest.mark.parametrize("fmt", FORMATS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    fmt: str, out_features: int, in_features: int, block_size: int = 64, nested_block_size: int | None = 32
) -> PackedWeight:
    packed, absmax = reference.quantize_blockwise(normal(out_features, in_features) * 0.02, fmt, block_size)
    if nested_block_size is None:
        return PackedWeight(packed, absmax, None, None, fmt, block_size, block_size, out_features, in_features)
    offset = absmax.mean()
    nested = (*reference.quantize_absmax(absmax, offset, nested_block_size), offset)
    return PackedWeight(packed, *nested, fmt, block_size, nested_block_size, out_features, in_features)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@dtypes
@every_format
def test_quantize_gives_the_bytes_of_the_reference(ops: CudaOps, fmt: str, dtype: torch.dtype) -> None:
    for number, numel in enumerate(LENGTHS):
        weight = normal(numel, seed=number).to(dtype)
        block_size = (32, 64, 256, 4096)[number % 4]
        for actual, expected in zip(
            ops.quantize_blockwise(weight, fmt, block_size),
            reference.quantize_blockwise(weight, fmt, block_size),
            strict=True,
        ):
            assert_same(actual, expected)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_takes_every_block_size(ops: CudaOps, block_size: int, dtype: torch.dtype) -> None:
    weight = normal(2 * 4096 + 100).to(dtype)
    for fmt in ("nf4", "int8"):
        actual, expected = (
            function(weight, fmt, block_size) for function in (ops.quantize_blockwise, reference.quantize_blockwise)
        )
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1])


@dtypes
def test_quantize_of_odd_values(ops: CudaOps, dtype: torch.dtype) -> None:
    weight = normal(320)
    weight[:64] = 0.0
    weight[70] = math.nan
    weight[130] = -math.inf
    weight[192:256] = 1e-40  # a denormal float32 and bfloat16
    weight = weight.to(dtype)
    for fmt in FORMATS:
        packed, absmax = ops.quantize_blockwise(weight, fmt, 64)
        expected_packed, expected_absmax = reference.quantize_blockwise(weight, fmt, 64)
        assert_same(packed, expected_packed)
        assert_same(absmax, expected_absmax)


def test_quantize_of_an_unaligned_weight(ops: CudaOps) -> None:
    weight = normal(1001)[1:]
    for actual, expected in zip(
        ops.quantize_blockwise(weight, "nf4", 64), reference.quantize_blockwise(weight, "nf4", 64), strict=True
    ):
        assert_same(actual, expected)


@dtypes
@pytest.mark.parametrize("nested_block_size", [None, 32, 256])
@every_format
def test_dequantize_gives_the_bytes_of_the_reference(
    ops: CudaOps, fmt: str, nested_block_size: int | None, dtype: torch.dtype
) -> None:
    for shape in ((3, 64), (5, 33), (1, 1), (17, 72), (33, 129)):
        weight = quantized(fmt, *shape, block_size=32, nested_block_size=nested_block_size)
        assert_same(ops.dequantize_weight(*weight, dtype), reference.dequantize_weight(*weight, dtype))


def test_dequantize_keeps_what_is_not_finite(ops: CudaOps) -> None:
    packed, absmax = reference.quantize_blockwise(
        torch.tensor([[1.0] * 64, [math.nan] * 64, [math.inf] * 64]), "nf4", 64
    )
    weight = PackedWeight(packed, absmax, None, None, "nf4", 64, 64, 3, 64)
    for dtype in DTYPES:
        assert_same(ops.dequantize_weight(*weight, dtype), reference.dequantize_weight(*weight, dtype))


def test_float16_rounds_as_torch_does(ops: CudaOps) -> None:
    edges = [65504.0, 65519.9, 65520.0, 2**-14, 2**-24, 2**-25, 1.5 * 2**-25, 6.1e-5, 5.96e-8, 1.0 + 2**-11]
    absmax = torch.cat((torch.tensor(edges), normal(500).abs() * 2.0 ** torch.arange(500).remainder(48).sub(30)))
    weight = PackedWeight(
        torch.full((16 * len(absmax),), 0xF0, dtype=torch.uint8), absmax, None, None, "nf4", 32, 32, len(absmax), 32
    )
    assert_same(ops.dequantize_weight(*weight, torch.float16), reference.dequantize_weight(*weight, torch.float16))


@pytest.mark.parametrize("shape", [(8, 64), (9, 40), (7, 33)])
def test_any_rectangle_of_a_weight_can_be_decoded(emulated: CudaLibrary, shape: tuple[int, int]) -> None:
    ops = CudaOps(emulated, streams=None)  # type: ignore[arg-type]
    weight = quantized("nf4", *shape)
    dense, view = reference.dequantize_weight(*weight, torch.bfloat16), ops._view(weight, torch.device("cpu"))
    for row, rows, column, columns in ((0, 2, 0, shape[1]), (3, 4, 8, 16), (1, 1, 5, 3), (2, 5, 1, shape[1] - 1)):
        out = torch.full((rows, columns), 7.0, dtype=torch.bfloat16)
        emulated.qlk_cuda_dequantize(byref(view), 1, row, rows, column, columns, out.data_ptr(), None)
        assert_same(out, dense[row : row + rows, column : column + columns].contiguous())


@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_double_quantization_gives_the_bytes_of_the_reference(ops: CudaOps, block_size: int) -> None:
    for blocks in (1, 31, 257, 5000):
        absmax = normal(blocks).abs()
        offset = absmax.mean()
        codes, nested_absmax = ops.quantize_absmax(absmax, offset, block_size)
        expected = reference.quantize_absmax(absmax, offset, block_size)
        assert_same(codes, expected[0])
        assert_same(nested_absmax, expected[1])
        assert_same(
            ops.dequantize_absmax(codes, nested_absmax, offset, block_size),
            reference.dequantize_absmax(codes, nested_absmax, offset, block_size),
        )


def test_double_quantization_of_equal_and_infinite_values(ops: CudaOps) -> None:
    for absmax in (torch.full((40,), 0.5), torch.tensor([1.0, math.inf, 2.0]), torch.tensor([1.0, math.nan])):
        offset = torch.tensor(0.5)
        for actual, expected in zip(
            ops.quantize_absmax(absmax, offset, 32), reference.quantize_absmax(absmax, offset, 32), strict=True
        ):
            assert_same(actual, expected)


def assert_product(actual: Tensor, exact: Tensor, magnitudes: Tensor, inner: int) -> None:
    """Compare with a product in float64 whose terms have the sum of magnitudes `magnitudes`.

    A sum of n float32 products errs by at most n roundings of that; the result is rounded to its dtype, and the
    tensor cores' weights and low-rank factors were rounded to it first, which `exact` may not have done.
    """
    rounding = 2.0 ** {torch.float32: -24, torch.bfloat16: -8, torch.float16: -11}[actual.dtype]
    bound = inner * 2.0**-24 * magnitudes + 3 * rounding * magnitudes.clamp(max=1e30) / math.sqrt(inner)
    bound = bound + rounding * exact.abs()
    assert ((actual.double() - exact).abs() <= bound + 1e-30).all()


@dtypes
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features"),
    [(1, 9, 64), (2, 33, 160), (4, 5, 33), (5, 40, 96), (16, 17, 288), (33, 35, 1184), (64, 32, 128), (80, 20, 50)],
)
def test_products_are_within_the_rounding_of_their_sums(
    ops: CudaOps, rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    for fmt in ("nf4", "int8"):
        weight = quantized(fmt, out_features, in_features, block_size=32)
        x, bias = normal(rows, in_features, seed=1).to(dtype), normal(out_features, seed=2)
        dense = reference.dequantize_weight(*weight, torch.float32).double()
        exact = x.double() @ dense.T + bias.to(dtype).double()
        magnitudes = x.double().abs() @ dense.abs().T + bias.double().abs()
        assert_product(ops.quantized_linear(x, *weight, bias), exact, magnitudes, in_features)


@dtypes
@pytest.mark.parametrize(("rows", "in_features", "rank"), [(1, 64, 4), (3, 40, 1), (12, 96, 20), (40, 160, 130)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_adapter_is_part_of_the_product(
    ops: CudaOps, rows: int, in_features: int, rank: int, dropout: float, dtype: torch.dtype
) -> None:
    weight = quantized("nf4", 38, in_features, block_size=32)
    x, A, B = normal(rows, in_features, seed=1).to(dtype), normal(rank, in_features, seed=3), normal(38, rank, seed=4)
    out, low = ops.lora_linear(x, *weight, None, A, B, 0.5, dropout, 9)
    dense = reference.dequantize_weight(*weight, torch.float32).double()
    dropped = drop(x.float(), dropout, 9).double()
    exact_low = dropped @ A.double().T
    # the panels' low-rank product is rounded to the dtype of x, as the reference's is
    torch.testing.assert_close(low.double(), exact_low, rtol=2e-2, atol=2e-2 * in_features**0.5)
    exact = x.double() @ dense.T + 0.5 * exact_low @ B.double().T
    magnitudes = x.double().abs() @ dense.abs().T + 0.5 * (dropped.abs() @ A.double().abs().T) @ B.double().abs().T
    assert_product(out, exact, magnitudes, in_features + rank)


@dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_those_of_the_reference(ops: CudaOps, dtype: torch.dtype, dropout: float) -> None:
    weight = quantized("nf4", 24, 40, block_size=32)
    gradient, x, low = normal(6, 24, seed=5).to(dtype), normal(6, 40, seed=6).to(dtype), normal(6, 4, seed=7)
    adapter = (normal(4, 40, seed=8), normal(24, 4, seed=9), 0.5, dropout, 3, True)
    arguments = (gradient, x, low, *weight, *adapter)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype]  # sums in the dtype of x
    for actual, expected in zip(
        ops.lora_linear_backward(*arguments), lora.lora_linear_backward(*arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Conversions(TorchDispatchMode):
    """Counts the launches that change a dtype, by the shape of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(arguments[0].shape))
        return function(*arguments, **(options or {}))


@dtypes
@pytest.mark.parametrize(("rows", "in_features"), [(1, 64), (3, 40), (12, 96), (80, 64)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_bfloat16_adapter_counts_as_its_values(
    ops: CudaOps, rows: int, in_features: int, dropout: float, dtype: torch.dtype
) -> None:
    """Bit for bit, whichever kernel reads it."""
    weight, x = quantized("nf4", 38, in_features, block_size=32), normal(rows, in_features, seed=1).to(dtype)
    short = (normal(20, in_features, seed=3).bfloat16(), normal(38, 20, seed=4).bfloat16())
    wide = tuple(matrix.float() for matrix in short)
    for actual, expected in zip(
        ops.lora_linear(x, *weight, None, *short, 0.5, dropout, 9),
        ops.lora_linear(x, *weight, None, *wide, 0.5, dropout, 9),
        strict=True,
    ):
        assert_same(actual, expected)
    given = (normal(rows, 38, seed=5).to(dtype), x, normal(rows, 20, seed=7), *weight)
    grad_x, *of_short = ops.lora_linear_backward(*given, *short, 0.5, dropout, 9, True)
    expected_x, *of_wide = ops.lora_linear_backward(*given, *wide, 0.5, dropout, 9, True)
    assert_same(grad_x, expected_x)
    for actual, expected in zip(of_short, of_wide, strict=True):
        assert_same(actual, expected.bfloat16())


@pytest.mark.parametrize("rows", [1, 12, 80])
def test_nothing_converts_a_bfloat16_adapter(emulated: CudaLibrary, streams: Streams, rows: int) -> None:
    """What a GPU would launch for it beside bfloat16 activations takes longer than reading a small matrix."""
    ops, weight = CudaOps(emulated, streams), quantized("nf4", 38, 96, block_size=32)
    x, gradient = normal(rows, 96, seed=1).bfloat16(), normal(rows, 38, seed=5).bfloat16()
    adapter = (normal(20, 96, seed=3).bfloat16(), normal(38, 20, seed=4).bfloat16())
    with Conversions() as seen:
        _, low = ops.lora_linear(x, *weight, None, *adapter, 0.5, 0.0, 0)
        ops.lora_linear_backward(gradient, x, low, *weight, *adapter, 0.5, 0.0, 0, True)
    assert set(seen.shapes) == {(rows, 20)}  # the low-rank product, which is kept in float32


def test_only_cpus_widen_a_bfloat16_adapter_for_their_kernels() -> None:
    with FakeTensorMode():
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
            assert as_kernels_take(torch.empty(4, 8, dtype=torch.bfloat16, device=device)).dtype == dtype


@dtypes
def test_dropout_is_that_of_the_reference(ops: CudaOps, dtype: torch.dtype) -> None:
    x, added = normal(3, 777).to(dtype), normal(3, 777, seed=1).to(dtype)
    assert_same(ops.drop(x, 0.3, 11), drop(x.float(), 0.3, 11).to(dtype))
    assert_same(ops.drop(x, 0.3, 11, added), (added.float() + drop(x.float(), 0.3, 11)).to(dtype))


NUMELS = (1, 5, 1000, 4096, 4097, 13_000)


def adamw_tensors(bits: int, block_size: int = 256, dtype: torch.dtype = torch.float32) -> list[AdamwTensor]:
    tensors = []
    for number, numel in enumerate(NUMELS):
        values = (normal(numel, seed=number).to(dtype), normal(numel, seed=100 + number).to(dtype))
        blocks = -(-numel // block_size)
        states: tuple[Tensor | None, ...] = (torch.zeros(numel), torch.zeros(numel), None, None)
        if bits == 8 and number % 2:
            codes = (torch.full((numel,), 127, dtype=torch.uint8), torch.zeros(numel, dtype=torch.uint8))
            states = (*codes, torch.zeros(blocks), torch.zeros(blocks))
        tensors.append(AdamwTensor(*values, *states, weight_decay=0.1 * (number % 2)))  # type: ignore[arg-type]
    return tensors


def assert_updates_alike(
    kernels: AdamwKernels, ours: list[AdamwTensor], expected: list[AdamwTensor], step: AdamwStep
) -> None:
    """Update `ours` with the kernels and `expected` with the reference, and compare every tensor."""
    kernels.update(ours, step)
    adamw_(expected, step)
    for pair in zip(ours, expected, strict=True):
        for actual, value in zip(*(tensor[:6] for tensor in pair), strict=True):
            if actual is not None:
                assert_same(actual, value)


@pytest.mark.parametrize(("bits", "block_size"), [(32, 256), (8, 32), (8, 256), (8, 1024), (8, 4096)])
def test_adamw_gives_the_bits_of_the_reference(adamw_kernels: AdamwKernels, bits: int, block_size: int) -> None:
    ours, expected = adamw_tensors(bits, block_size), adamw_tensors(bits, block_size)
    for number in range(1, 4):
        step = AdamwStep(1e-2, 0.9, 0.99, 1e-8, number, gradient_scale=0.7, block_size=block_size)
        assert_updates_alike(adamw_kernels, ours, expected, step)


@pytest.mark.parametrize("bits", [32, 8])
def test_adamw_of_bfloat16_parameters(adamw_kernels: AdamwKernels, bits: int) -> None:
    ours, expected = ([*adamw_tensors(bits, dtype=torch.bfloat16), *adamw_tensors(bits)] for _ in range(2))
    for number in range(1, 3):
        assert_updates_alike(adamw_kernels, ours, expected, AdamwStep(1e-2, 0.9, 0.99, 1e-8, number, 0.7))
    gradients = [tensor.gradient for tensor in ours]
    assert adamw_kernels.gradient_norm(gradients, 2.0) == gradient_norm(gradients, 2.0)


class CountedCalls:
    """Counts what a library is asked for."""

    def __init__(self, library: CudaLibrary) -> None:
        self._library, self.calls = library, Counter[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.calls[name] += 1
        function: Callable[..., Any] = getattr(self._library, name)
        return function


def test_all_tensors_are_updated_in_one_call(
    emulated: CudaLibrary, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch and a wait for each of a 7B model's 448 tensors would take longer than their update."""
    library = CountedCalls(emulated)
    weights = [normal(numel, seed=numel).requires_grad_() for numel in (*NUMELS, *range(40, 60))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = AdamW(weights, bits=8, kernels=CudaAdamw(library, streams))  # type: ignore[arg-type]
    waits: list[torch.Size] = []
    to_host = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: waits.append(tensor.shape) or to_host(tensor))
    optimizer.gradient_norm()
    optimizer.step()
    assert library.calls == {"qlk_cuda_gradient_norm": 1, "qlk_cuda_adamw": 1}
    assert waits == [(2,)]  # the norm, and the first tensor that is not finite


def test_adamw_of_gradients_that_are_not_finite(adamw_kernels: AdamwKernels) -> None:
    ours, expected = adamw_tensors(8), adamw_tensors(8)
    for tensors in (ours, expected):
        tensors[3].gradient[17] = math.nan
        tensors[5].gradient[300] = math.inf
    assert_updates_alike(adamw_kernels, ours, expected, AdamwStep(1e-2, 0.9, 0.99, 1e-8, 1))


def test_the_gradient_norm_is_that_of_the_reference(adamw_kernels: AdamwKernels) -> None:
    gradients = [normal(numel, seed=numel) for numel in NUMELS]
    assert adamw_kernels.gradient_norm(gradients, -0.5) == gradient_norm(gradients, -0.5)
    assert adamw_kernels.gradient_norm([], 1.0) == (0.0, None)
    for seed in range(30):  # of many magnitudes, so that another order of the sums shows
        gradient = normal(4096, seed=seed) * 10 ** normal(4096, seed=100 + seed)
        assert adamw_kernels.gradient_norm([gradient], 1.0) == gradient_norm([gradient], 1.0)
    gradients[4][4096] = math.inf
    gradients[5][0] = math.nan
    norm, first = adamw_kernels.gradient_norm(gradients, 1.0)
    assert first == 4
    assert not math.isfinite(norm)
