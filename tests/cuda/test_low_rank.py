"""The adapter's low-rank products with dropout inside them: the reference's mask, and sums within their rounding."""

from collections.abc import Callable
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lab.errors import KernelError, ShapeError
from qlora_lab.ops.lora import reference
from qlora_lab.ops.lora.dropout import RANGE, drop, key
from qlora_lab.ops.lora.op import LORA_LINEAR
from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.cuda_library import CudaLibrary, LowRankView
from qlora_lab.ops.native.cuda_low_rank import FusedLowRank
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_plan import LowRankPlan
from qlora_lab.ops.native.cuda_streams import InOrder
from qlora_lab.ops.registry import CUDA_KERNELS
from tests.cuda.conftest import PLACES, OneQueue
from tests.cuda.queues import OneDevice, Queue
from tests.cuda.test_cuda_kernels import normal, quantized
from tests.cuda.test_panels import SMALL_CACHE

SEED = 11
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half of a last place
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
shares = pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
# with vectors and without, and x's inner dimension shorter and longer than what a block's warps take in one step
shapes = pytest.mark.parametrize(
    ("rows", "in_features", "rank"),
    [(65, 40, 1), (127, 104, 8), (130, 1100, 16), (33, 800, 20), (300, 72, 64), (66, 50, 64), (70, 96, 100)],
)
Products = Callable[..., FusedLowRank]


class OnDevice(FusedLowRank):
    """Products whose matrices and results lie on the CPU, and sums begin as NaN: what nobody writes shows."""

    def down(self, lora_A: Tensor) -> tuple[Tensor, Tensor]:
        low, rounded = super().down(lora_A.to(self._x.device))
        return low.cpu(), rounded.cpu()

    def grad_A(self, grad_low: Tensor, dtype: torch.dtype) -> Tensor:
        return super().grad_A(grad_low.to(self._x.device), dtype).cpu()

    def add(self, grad_low: Tensor, lora_A: Tensor, part: Tensor, first: int, count: int) -> None:
        whole = part._base.to(self._x.device)  # type: ignore[union-attr]
        moved = whole[:, first : first + count]
        super().add(grad_low.to(self._x.device), lora_A.to(self._x.device), moved, first, count)
        part._base.copy_(whole)  # type: ignore[union-attr]

    def _workspace(self, *shape: int) -> Tensor:
        return super()._workspace(*shape).fill_(torch.nan)


@pytest.fixture(params=PLACES)
def products(request: pytest.FixtureRequest) -> Products:
    """The products of an x (rows, in_features) with a rank and a dropout, by the kernels."""
    on_gpu = request.param == "gpu"
    library = CUDA_KERNELS.library if on_gpu else request.getfixturevalue("emulated")
    streams = CUDA_KERNELS.streams if on_gpu else OneQueue()

    def make(x: Tensor, rank: int, dropout: float, splits: tuple[int, int] = (2, 3)) -> FusedLowRank:
        plan = LowRankPlan("fused", *splits)
        moved = x.cuda() if on_gpu else x
        return OnDevice(library, streams, moved, rank, dropout, SEED, plan)  # type: ignore[arg-type]

    return make


def dropped(x: Tensor, dropout: float) -> Tensor:
    return drop(x.float(), dropout, SEED).double()


def assert_sum(actual: Tensor, left: Tensor, right: Tensor) -> None:
    """Compare with left @ right in float64; float32 sums on tensor cores may be cut off instead of rounded."""
    exact, magnitudes = left @ right, left.abs() @ right.abs()
    bound = 2 * (left.shape[1] + 8) * ROUNDING[torch.float32] * magnitudes + ROUNDING[actual.dtype] * exact.abs()
    assert actual.isfinite().all()
    assert ((actual.double() - exact).abs() <= bound + 1e-7).all()  # denormal float16


@dtypes
@shares
@shapes
def test_the_low_rank_product_is_of_what_dropout_leaves(
    products: Products, rows: int, in_features: int, rank: int, dropout: float, dtype: torch.dtype
) -> None:
    x, A = normal(rows, in_features, seed=1).to(dtype), normal(rank, in_features, seed=2).to(dtype)
    low, rounded = products(x, rank, dropout).down(A)
    assert (low.dtype, rounded.dtype) == (torch.float32, dtype)
    assert_sum(low, dropped(x, dropout), A.double().T)
    assert torch.equal(rounded, low.to(dtype))


@dtypes
@shares
@shapes
def test_the_gradient_of_lora_A_is_of_what_dropout_left(
    products: Products, rows: int, in_features: int, rank: int, dropout: float, dtype: torch.dtype
) -> None:
    x, grad_low = normal(rows, in_features, seed=1).to(dtype), normal(rows, rank, seed=3).to(dtype)
    of_x = products(x, rank, dropout)
    for result in (torch.float32, torch.bfloat16):
        actual = of_x.grad_A(grad_low, result)
        assert actual.dtype == result
        assert_sum(actual, grad_low.double().T, dropped(x, dropout))


@dtypes
@shares
@shapes
def test_a_panel_of_the_gradient_of_x_gets_its_part(
    products: Products, rows: int, in_features: int, rank: int, dropout: float, dtype: torch.dtype
) -> None:
    grad_low, A = normal(rows, rank, seed=3).to(dtype), normal(rank, in_features, seed=2).to(dtype)
    before = normal(rows, in_features, seed=4).to(dtype)
    of_x = products(torch.zeros_like(before), rank, dropout)
    mask = drop(torch.ones(rows, in_features), dropout, SEED).double()
    for first, count in ((0, in_features), (in_features // 16 * 8, 8), (3, in_features - 7)):
        grad_x = before.clone()
        of_x.add(grad_low, A, grad_x[:, first : first + count], first, count)
        columns = slice(first, first + count)
        added = grad_low.double() @ A.double()
        exact = before.double() + mask * added
        bound = 2 * (rank + 8) * ROUNDING[torch.float32] * (grad_low.double().abs() @ A.double().abs()) * mask
        bound = bound + ROUNDING[dtype] * exact.abs() + 1e-7
        assert ((grad_x.double() - exact).abs() <= bound)[:, columns].all()
        assert torch.equal(grad_x[:, :first], before[:, :first])
        assert torch.equal(grad_x[:, first + count :], before[:, first + count :])


@pytest.mark.parametrize("in_features", [96, 90])
def test_the_mask_is_that_of_the_reference_and_of_the_cpu_kernels(products: Products, in_features: int) -> None:
    """Bit for bit: one term in each sum."""
    x, dropout = normal(70, in_features, seed=1).bfloat16(), 0.1
    expected = drop(x.float(), dropout, SEED)
    of_x = products(x, 16, dropout)
    for first in range(0, in_features - 15, 16):
        picks = torch.eye(in_features)[first : first + 16]
        low, _ = of_x.down(picks.bfloat16())
        assert torch.equal(low, expected[:, first : first + 16])
        weight = quantized("nf4", 8, in_features)
        _, of_cpu = LORA_LINEAR(x.float(), *weight, None, picks, torch.zeros(8, 16), 1.0, dropout, SEED)
        assert torch.equal(low, of_cpu)
    rows = torch.eye(70)[:, 3:19].bfloat16()
    assert torch.equal(of_x.grad_A(rows, torch.float32), expected[3:19])
    ones = torch.ones(70, 1).bfloat16()
    grad_x = torch.zeros_like(x)
    products(x, 1, dropout).add(ones, torch.ones(1, in_features).bfloat16(), grad_x[:, :], 0, in_features)
    assert torch.equal(grad_x, drop(torch.ones(70, in_features), dropout, SEED).bfloat16())


def test_elements_beyond_32_bits_have_another_key(emulated: CudaLibrary) -> None:
    """One row as long as that; only the columns around its 2^32-th element are there."""
    first, count, dropout = 2**32 - 24, 48, 0.5
    for shift in (0, 5):
        grad_x, ones = torch.zeros(count).bfloat16(), torch.ones(count).bfloat16()
        shape = LowRankView(1, 2**32 + 24, 1, SEED, dropout, DTYPE_CODES[torch.bfloat16])
        emulated.qlk_cuda_low_rank_add(
            *(byref(shape), ones.data_ptr(), ones.data_ptr() - 2 * first, first + shift, count - shift),
            *(grad_x.data_ptr() + 2 * shift, None),
        )
        expected = [2.0 * (draw(first + i) >= RANGE // 2) * (i >= shift) for i in range(count)]
        assert grad_x.tolist() == expected


def draw(element: int) -> int:
    """Return what `dropout.draws` gives for this element alone."""
    before, between = key(SEED, element >> 32)
    x = (element & 0xFFFFFFFF) ^ before
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) + between) * 0x846CA68B & 0xFFFFFFFF
    return (x ^ x >> 16) >> 8


@dtypes
def test_what_is_dropped_does_not_count_even_where_it_is_not_finite(products: Products, dtype: torch.dtype) -> None:
    x, dropout = normal(70, 96, seed=1).to(dtype), 0.5
    gone = drop(torch.ones(70, 96), dropout, SEED) == 0
    x[gone] = torch.nan
    grad_low, A = normal(70, 16, seed=3).to(dtype), normal(16, 96, seed=2).to(dtype)
    of_x = products(x, 16, dropout)
    assert of_x.down(A)[0].isfinite().all()
    assert of_x.grad_A(grad_low, torch.float32).isfinite().all()
    grad_x = torch.ones_like(x)
    of_x.add(grad_low.fill_(torch.inf), A, grad_x[:, :], 0, 96)
    assert (grad_x[gone] == 1).all()
    assert not grad_x[~gone].isfinite().any()


@pytest.mark.parametrize("splits", [(1, 1), (3, 2), (9, 9)])
def test_every_split_gives_the_same_sum_and_every_run_the_same_bits(
    products: Products, splits: tuple[int, int]
) -> None:
    """Also splits that nothing is left for."""
    x, grad_low = normal(257, 1032, seed=1).bfloat16(), normal(257, 16, seed=3).bfloat16()
    A = normal(16, 1032, seed=2).bfloat16()
    of_x = products(x, 16, 0.1, splits)
    low, grad_A = of_x.down(A)[0], of_x.grad_A(grad_low, torch.float32)
    assert_sum(low, dropped(x, 0.1), A.double().T)
    assert_sum(grad_A, grad_low.double().T, dropped(x, 0.1))
    for _ in range(2):
        assert torch.equal(of_x.down(A)[0], low)
        assert torch.equal(of_x.grad_A(grad_low, torch.float32), grad_A)


def test_without_rows_or_columns_gradients_are_zero(products: Products) -> None:
    nothing = torch.zeros(0, 16).bfloat16()
    assert torch.equal(products(nothing, 4, 0.1).grad_A(nothing[:, :4], torch.float32), torch.zeros(4, 16))
    low, _ = products(torch.zeros(70, 0).bfloat16(), 4, 0.1).down(torch.zeros(4, 0).bfloat16())
    assert torch.equal(low, torch.zeros(70, 4))


def shifted(tensor: Tensor) -> Tensor:
    """Return it where no vector may begin: one element beyond an allocation's start."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


@dtypes
@pytest.mark.parametrize("lay", [shifted, transposed, Tensor.contiguous])
@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16], ids=str)
def test_the_op_takes_tensors_as_they_lie(
    ops: CudaOps, lay: Callable[[Tensor], Tensor], of_adapter: torch.dtype, dtype: torch.dtype
) -> None:
    weight = quantized("nf4", 48, 136, block_size=32)
    x, gradient = (lay(normal(130, width, seed=width).to(dtype)) for width in (136, 48))
    A, B = (lay(normal(*shape, seed=2).to(of_adapter)) for shape in ((8, 136), (48, 8)))
    adapter = (A, B, 0.5, 0.1, SEED)
    out, low = ops.lora_linear(x, *weight, None, *adapter)
    gradients = ops.lora_linear_backward(gradient, x, low, *weight, *adapter, True)
    wide = (x.double(), weight, None, *(matrix.to(dtype).double() for matrix in (A, B)), 0.5, 0.1, SEED)
    exact, exact_low, exact_gradients = in_float64(gradient.double(), *wide)
    bounds = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of the norm: low and the products were rounded on the way
    for actual, expected in zip((out, low, *gradients), (exact, exact_low, *exact_gradients), strict=True):
        assert (actual.double() - expected).norm() <= bounds[dtype] * expected.norm()
    assert [part.dtype for part in gradients] == [dtype, of_adapter, of_adapter]


def in_float64(gradient: Tensor, x: Tensor, weight: Any, bias: None, A: Tensor, B: Tensor, *adapter: Any) -> Any:
    """Return the outputs of lora_linear, and its gradients, with the reference's mask."""
    scaling, dropout, seed = adapter
    dense = torch.ops.qlora_lab.dequantize_weight(*weight, torch.float32).double()
    seen = drop(x.float(), dropout, seed).double()
    mask = drop(torch.ones_like(x, dtype=torch.float32), dropout, seed).double()
    low, grad_low = seen @ A.T, scaling * gradient @ B
    gradients = gradient @ dense + mask * (grad_low @ A), grad_low.T @ seen, scaling * gradient.T @ low
    return x @ dense.T + scaling * low @ B.T, low, gradients


def test_it_is_no_less_exact_than_a_product_of_a_rounded_copy(ops: CudaOps) -> None:
    weight = quantized("nf4", 48, 512, block_size=32)
    x, gradient = normal(130, 512, seed=1).bfloat16(), normal(130, 48, seed=2).bfloat16()
    A, B = normal(8, 512, seed=2).bfloat16(), normal(48, 8, seed=3).bfloat16()
    arguments = (*weight, None, A, B, 0.5, 0.1, SEED)
    exact, exact_low, exact_gradients = in_float64(
        gradient.double(), x.double(), weight, None, A.double(), B.double(), 0.5, 0.1, SEED
    )
    errors = []
    for implementation in (ops, reference):
        out, low = implementation.lora_linear(x, *arguments)
        backward = (*weight, A, B, 0.5, 0.1, SEED, True)
        results = (out, low, *implementation.lora_linear_backward(gradient, x, low, *backward))
        both = zip(results, (exact, exact_low, *exact_gradients), strict=True)
        errors.append([float((actual.double() - expected).norm()) for actual, expected in both])
    ours, of_copy = errors
    assert all(error <= 1.02 * other for error, other in zip(ours, of_copy, strict=True))
    assert ours[1] < 0.01 * of_copy[1]  # low is not rounded


class Allocations(TorchDispatchMode):
    """Notes the storages that are made, by address: their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        self.kept += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def sizes_from(self, size: int, *given: Tensor) -> list[int]:
        """Return the sizes of at least `size` bytes, but of `given`."""
        storages = {kept.untyped_storage().data_ptr(): kept.untyped_storage().nbytes() for kept in self.kept}
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        return [found for address, found in storages.items() if found >= size and address not in known]


def test_nothing_of_the_size_of_x_is_allocated(emulated: CudaLibrary, streams: OneQueue) -> None:
    """But the gradient of x: no dropped copy, and no product that is dropped after it."""
    ops, weight = CudaOps(emulated, streams), quantized("nf4", 48, 512, block_size=32)
    x, gradient = normal(130, 512, seed=1).bfloat16(), normal(130, 48, seed=2).bfloat16()
    adapter = (normal(16, 512, seed=3), normal(48, 16, seed=4), 0.5, 0.1, SEED)
    with Allocations() as seen:
        _, low = ops.lora_linear(x, *weight, None, *adapter)
    assert seen.sizes_from(x.nbytes, x) == []
    with Allocations() as seen:
        grad_x, *_ = ops.lora_linear_backward(gradient, x, low, *weight, *adapter, True)
    assert seen.sizes_from(x.nbytes, x) == [grad_x.nbytes]


class Watched:
    """A library that notes which low-rank kernels are queued, and where."""

    def __init__(self, library: CudaLibrary, note: Callable[[str, int], None]) -> None:
        self._library, self._note = library, note

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if not name.startswith("qlk_cuda_low_rank"):
            return function

        def call(*arguments: Any) -> Any:
            self._note(name.removeprefix("qlk_cuda_low_rank_"), arguments[-1])
            return function(*arguments)

        return call


class TwoQueues(OneDevice):
    """Products on the current stream, decoding on one beside it; every panel in its turn."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(Queue("current", 1))
        self._events = events

    def ahead(self, device: torch.device, panels: int) -> InOrder:
        events = self._events

        class Turns(InOrder):
            def multiplied(self, panel: int) -> None:
                events.append(f"multiply {panel}")

        return Turns(2)


def test_each_panel_is_added_to_on_the_stream_of_its_product_and_before_the_next(
    emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaLibrary, "device", lambda self, index: SMALL_CACHE)
    events: list[str] = []
    queues = TwoQueues(events)

    def note(name: str, stream: int) -> None:
        assert stream == queues.current.cuda_stream and queues.is_current
        events.append(name)

    ops = CudaOps(Watched(emulated, note), queues)  # type: ignore[arg-type]
    weight, x = quantized("nf4", 384, 256, block_size=32), normal(90, 256, seed=1).bfloat16()
    adapter = (normal(4, 256, seed=3), normal(384, 4, seed=4), 0.5, 0.5, SEED)
    _, low = ops.lora_linear(x, *weight, None, *adapter)
    assert events == ["down", "multiply 0", "multiply 1", "multiply 2"]
    events.clear()
    ops.lora_linear_backward(normal(90, 384).bfloat16(), x, low, *weight, *adapter, True)
    assert events == ["grad_A", "multiply 0", "add", "multiply 1", "add"]
    events.clear()
    ops.lora_linear_backward(normal(90, 384).bfloat16(), x, low, *weight, *adapter, False)
    assert events == ["grad_A"]


def test_without_dropout_or_in_float32_they_are_torchs(emulated: CudaLibrary, streams: OneQueue) -> None:
    events: list[str] = []
    ops = CudaOps(Watched(emulated, lambda name, stream: events.append(name)), streams)  # type: ignore[arg-type]
    weight, x = quantized("nf4", 40, 96, block_size=32), normal(90, 96, seed=1)
    for each, rank, dropout in ((x.bfloat16(), 4, 0.0), (x, 4, 0.5), (x.bfloat16(), 257, 0.5)):
        adapter = (normal(rank, 96, seed=3), normal(40, rank, seed=4), 0.5, dropout, SEED)
        _, low = ops.lora_linear(each, *weight, None, *adapter)
        ops.lora_linear_backward(normal(90, 40).to(each.dtype), each, low, *weight, *adapter, True)
    assert events == []


def test_parts_on_another_device_are_refused(emulated: CudaLibrary, streams: OneQueue) -> None:
    ops, weight, x = CudaOps(emulated, streams), quantized("nf4", 8, 32), normal(70, 32).bfloat16()
    A, B, low, gradient = normal(4, 32), normal(8, 4), normal(70, 4), normal(70, 8).bfloat16()
    for index, name in ((0, "grad_output"), (2, "lora_A"), (3, "lora_B")):
        parts = [gradient, x, A, B]
        parts[index] = parts[index].to("meta")
        with pytest.raises(ShapeError, match=f"{name} lies on meta"):
            ops.lora_linear_backward(*parts[:2], low, *weight, *parts[2:], 0.5, 0.1, SEED, True)


def test_bad_arguments_are_refused(emulated: CudaLibrary) -> None:
    down, grad_A, add = (getattr(emulated, f"qlk_cuda_low_rank_{name}") for name in ("down", "grad_A", "add"))
    some = torch.zeros(64).data_ptr()
    good = (2, 8, 4, SEED, 0.5, 1)

    def shape(**changes: Any) -> Any:
        view = LowRankView(*good)
        for name, value in changes.items():
            setattr(view, name, value)
        return byref(view)

    for changes, sentence in (
        ({"dtype": 0}, "dtype"),
        ({"rows": -1}, "a size is"),
        ({"rank": 2**60}, "a size is"),
        ({"rows": 2**40, "in_features": 2**40}, "a size is"),
        ({"dropout": 1.0}, "a size is"),
        ({"dropout": float("nan")}, "a size is"),
    ):
        for call in (
            lambda view: down(view, some, some, 1, some, some, some, None),
            lambda view: grad_A(view, some, some, 1, some, some, 0, None),
            lambda view: add(view, some, some, 0, 8, some, None),
        ):
            with pytest.raises(KernelError, match=sentence):
                call(shape(**changes))
    for splits in (0, 2**62):
        with pytest.raises(KernelError, match="a size is"):
            down(shape(), some, some, splits, some, some, some, None)
    with pytest.raises(KernelError, match="dtype"):
        grad_A(shape(), some, some, 1, some, some, DTYPE_CODES[torch.float16], None)
    for first, count in ((-1, 4), (5, 4), (0, 9), (0, -1)):
        with pytest.raises(KernelError, match="a size is"):
            add(shape(), some, some, first, count, some, None)
    for arguments in ((0, some, 1, some, some), (some, 0, 1, some, some), (some, some, 1, 0, some)):
        with pytest.raises(KernelError, match="a pointer is null"):
            down(shape(), *arguments, some, None)
        with pytest.raises(KernelError, match="a pointer is null"):
            grad_A(shape(), *arguments, 0, None)
    with pytest.raises(KernelError, match="a pointer is null"):
        add(shape(), some, some, 0, 8, 0, None)
