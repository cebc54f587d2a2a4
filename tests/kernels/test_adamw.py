"""Native AdamW equals the reference bit for bit: every instruction set, any number of threads, any length."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qlora_lab.ops.adamw import reference as adamw
from qlora_lab.ops.adamw.optimizer import AdamW
from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor
from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.library import AdamwView

OK, BAD_BLOCK_SIZE, BAD_DTYPE, BAD_SIZE, NULL_POINTER = 0, 2, 3, 4, 5
GUARD = 64  # elements before and after every tensor that nobody may touch
STEP = AdamwStep(learning_rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, step=1, gradient_scale=0.37)
LENGTHS = (0, 1, 7, 16, 33, 4095, 4097, 0, 10007)


class NativeKernels:
    """The C functions as `AdamwKernels`; a status other than 0 fails the test."""

    def __init__(self, library: ctypes.CDLL, threads: int = 1) -> None:
        pointer, count, double, threads_type = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
        norm = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, count, double, ctypes.POINTER(double), ctypes.POINTER(count), threads_type
        )
        update = ctypes.CFUNCTYPE(ctypes.c_int, pointer, count, *[double] * 5, count, count, threads_type)
        self._norm = norm(("qlk_cpu_gradient_norm", library))
        self._update = update(("qlk_cpu_adamw", library))
        self.threads = threads

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        tensors = (AdamwView * len(gradients))()
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.gradient, tensor.numel = gradient.data_ptr(), gradient.numel()
            tensor.dtype = DTYPE_CODES[gradient.dtype]
        norm, first = ctypes.c_double(math.nan), ctypes.c_int64(-2)
        status = self._norm(tensors, len(gradients), gradient_scale, norm, first, self.threads)
        assert status == OK
        return norm.value, None if first.value == -1 else first.value

    def status(self, tensors: "Sequence[AdamwView] | None", count: int, step: AdamwStep) -> int:
        pointer = None if tensors is None else (AdamwView * len(tensors))(*tensors)
        return self._update(
            pointer,
            count,
            *(step.learning_rate, step.beta1, step.beta2, step.eps, step.gradient_scale, step.step, step.block_size),
            self.threads,
        )

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        assert self.status([c_tensor(tensor) for tensor in tensors], len(tensors), step) == OK


def c_tensor(tensor: AdamwTensor) -> AdamwView:
    pointers = [None if t is None else t.data_ptr() for t in tensor[:6]]
    return AdamwView(*pointers, tensor.parameter.numel(), tensor.weight_decay, DTYPE_CODES[tensor.parameter.dtype])


class Guarded:
    """Tensors that lie inside larger ones, at odd places, with a pattern around them."""

    def __init__(self) -> None:
        self._whole: list[tuple[Tensor, Tensor, slice]] = []

    def place(self, values: Tensor, shift: int) -> Tensor:
        pattern = 0xA5 if values.dtype == torch.uint8 else math.nan
        whole = torch.full((values.numel() + 2 * GUARD + shift,), pattern, dtype=values.dtype)
        inside = slice(GUARD + shift, GUARD + shift + values.numel())
        whole[inside] = values
        self._whole.append((whole, whole.clone(), inside))
        return whole[inside]

    def check(self) -> None:
        for whole, before, inside in self._whole:
            whole = whole.clone()
            whole[inside] = before[inside]
            assert_same_bits(whole, before)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, so that -0 is not 0; but all NaN count as the same."""
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = (t.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf) for t in (actual, expected))
        bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
        actual, expected = actual.view(bits), expected.view(bits)
    assert torch.equal(actual, expected)


def magnitudes(length: int, generator: torch.Generator) -> Tensor:
    """Return values of either sign from denormals to large ones, with runs of zeros."""
    exponents = torch.rand(length, generator=generator) * 24 - 20
    values = torch.randn(length, generator=generator) * 10**exponents
    values[torch.rand(length, generator=generator) < 0.1] = 0.0
    tiny = torch.rand(length, generator=generator) < 0.1
    return torch.where(tiny, torch.randn(length, generator=generator) * 1e-41, values)


def make_tensors(
    lengths: Sequence[int], block_size: int | None, seed: int, dtype: torch.dtype = torch.float32
) -> list[AdamwTensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for length in lengths:
        parameter, gradient = torch.randn(length, generator=generator), magnitudes(length, generator)
        if block_size is None:
            states = [magnitudes(length, generator), magnitudes(length, generator).abs(), None, None]
        else:
            blocks = -(-length // block_size)
            codes = [torch.randint(256, (length,), generator=generator, dtype=torch.uint8) for _ in range(2)]
            states = [*codes, magnitudes(blocks, generator).abs(), magnitudes(blocks, generator).abs()]
        tensors.append(AdamwTensor(parameter.to(dtype), gradient.to(dtype), *states, 0.01))
    return tensors


def copies(tensors: Sequence[AdamwTensor], guarded: Guarded) -> list[AdamwTensor]:
    """Return copies at odd places: no two with the same distance from a multiple of the vector length."""
    return [
        AdamwTensor(
            *(None if t is None else guarded.place(t, shift=3 * i + k) for k, t in enumerate(tensor[:6])),
            tensor.weight_decay,
        )
        for i, tensor in enumerate(tensors)
    ]


def assert_same(actual: Sequence[AdamwTensor], expected: Sequence[AdamwTensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        for name in ("parameter", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"):
            if getattr(e, name) is not None:
                assert_same_bits(getattr(a, name), getattr(e, name))


def assert_updates_alike(native: NativeKernels, tensors: list[AdamwTensor], step: AdamwStep, steps: int = 1) -> None:
    """Run native and reference on copies of `tensors` and compare everything, the memory around them included."""
    guarded = Guarded()
    actual, expected = copies(tensors, guarded), copies(tensors, Guarded())
    for number in range(steps):
        native.update(actual, replace(step, step=step.step + number))
        adamw.adamw_(expected, replace(step, step=step.step + number))
    assert_same(actual, expected)
    guarded.check()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_float_states_equal_the_reference(library: ctypes.CDLL, threads: int) -> None:
    tensors = make_tensors(LENGTHS, None, seed=0)
    assert_updates_alike(NativeKernels(library, threads), tensors, STEP, steps=3)


@pytest.mark.parametrize("block_size", [None, 32, 256, 4096])
def test_bfloat16_parameters_equal_the_reference(library: ctypes.CDLL, block_size: int | None) -> None:
    """Also beside float32 ones in the same call."""
    halves = make_tensors(LENGTHS, block_size, seed=11, dtype=torch.bfloat16)
    tensors = [*halves, *make_tensors((33, 4097), block_size, seed=12)]
    step = replace(STEP, block_size=block_size or 256)
    assert_updates_alike(NativeKernels(library, threads=2), tensors, step, steps=3)
    gradients = [tensor.gradient for tensor in tensors]
    assert NativeKernels(library).gradient_norm(gradients, 0.5) == adamw.gradient_norm(gradients, 0.5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_8bit_states_equal_the_reference(library: ctypes.CDLL, block_size: int, threads: int) -> None:
    tensors = make_tensors(LENGTHS, block_size, seed=block_size)
    step = replace(STEP, block_size=block_size)
    assert_updates_alike(NativeKernels(library, threads), tensors, step, steps=3)


def test_float_and_8bit_states_mix(library: ctypes.CDLL) -> None:
    tensors = make_tensors((100, 5000), None, seed=1) + make_tensors((5000, 300), 256, seed=2)
    tensors = [tensors[0], tensors[2], tensors[1]._replace(weight_decay=0.0), tensors[3]]
    assert_updates_alike(NativeKernels(library, threads=2), tensors, replace(STEP, step=1000))


@pytest.mark.parametrize("threads", [2, 5])
def test_many_tensors_do_not_depend_on_threads(library: ctypes.CDLL, threads: int) -> None:
    lengths = torch.randint(1, 12000, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    tensors = make_tensors(lengths, 64, seed=4)
    step = replace(STEP, block_size=64)
    one, many = copies(tensors, Guarded()), copies(tensors, Guarded())
    NativeKernels(library, 1).update(one, step)
    NativeKernels(library, threads).update(many, step)
    assert_same(many, one)


def test_exp_avg_is_rounded_at_every_midpoint(library: ctypes.CDLL) -> None:
    """With beta1 = 0 and a largest gradient of 1 the encoded values are the gradients themselves."""
    levels = torch.tensor(adamw.dynamic_map_levels(signed=True), dtype=torch.float32)
    between = (levels[1:] + levels[:-1]) / 2
    infinity = torch.tensor(math.inf)
    around = torch.stack([levels[:-1], between, between.nextafter(-infinity), between.nextafter(infinity)])
    gradient = torch.nn.functional.pad(around, (1, 0), value=1.0).flatten()  # a 1 in every block of 256
    tensor = zero_8bit(gradient)
    NativeKernels(library).update([tensor], replace(STEP, beta1=0.0, gradient_scale=1.0))
    assert torch.equal(tensor.exp_avg_absmax, torch.ones(4))
    assert torch.equal(tensor.exp_avg, torch.bucketize(gradient, between).to(torch.uint8))
    ranks = torch.arange(255, dtype=torch.uint8)
    codes = tensor.exp_avg.view(4, 256)[:, 1:]
    assert torch.equal(codes, torch.stack([ranks, ranks, ranks, ranks + 1]))  # a tie goes to the lower level


def test_each_midpoint_alone(library: ctypes.CDLL) -> None:
    """Blocks around one midpoint each, so that no other value sends the vector down a slower way."""
    levels = torch.tensor(adamw.dynamic_map_levels(signed=True), dtype=torch.float32)
    between = (levels[1:] + levels[:-1]) / 2
    lower, higher = between.nextafter(torch.tensor(-math.inf)), between.nextafter(torch.tensor(math.inf))
    around = torch.stack([between, lower, higher], dim=1)
    gradient = torch.cat([torch.ones(255, 16), around.repeat(1, 16)], dim=1).flatten()
    tensor = zero_8bit(gradient, 64)
    NativeKernels(library).update([tensor], replace(STEP, beta1=0.0, gradient_scale=1.0, block_size=64))
    assert torch.equal(tensor.exp_avg, torch.bucketize(gradient, between).to(torch.uint8))


@pytest.mark.parametrize("largest", [1.0, -1.0])
def test_a_sweep_over_all_magnitudes(library: ctypes.CDLL, largest: float) -> None:
    """Every code of either map comes up, many times over."""
    count = 2**16
    exponents = torch.rand(count, generator=torch.Generator().manual_seed(8)) * 8 - 8
    gradient = 10**exponents * torch.tensor([1.0, -1.0]).repeat(count // 2)
    gradient[::4096] = largest
    tensor = zero_8bit(gradient, 4096)
    step = replace(STEP, beta1=0.0, beta2=0.0, gradient_scale=1.0, block_size=4096)
    NativeKernels(library).update([tensor], step)
    for signed, values, codes in ((True, gradient, tensor.exp_avg), (False, gradient.square(), tensor.exp_avg_sq)):
        levels = torch.tensor(adamw.dynamic_map_levels(signed=signed), dtype=torch.float32)
        expected = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        assert torch.equal(codes, expected)
        assert expected.unique().numel() == 256


def test_exp_avg_sq_is_rounded_at_every_midpoint(library: ctypes.CDLL) -> None:
    """Likewise with beta2 = 0; the squares of neighbouring gradients lie on both sides of each midpoint."""
    levels = torch.tensor(adamw.dynamic_map_levels(signed=False), dtype=torch.float32)
    between = (levels[1:] + levels[:-1]) / 2
    near = between.sqrt().view(torch.int32)[:, None] + torch.arange(-4, 5, dtype=torch.int32)
    gradient = torch.nn.functional.pad(near.view(torch.float32).T, (1, 0), value=1.0).flatten()
    tensor = zero_8bit(gradient)
    NativeKernels(library).update([tensor], replace(STEP, beta2=0.0, gradient_scale=1.0))
    expected = torch.bucketize(gradient * gradient, between).to(torch.uint8)
    assert torch.equal(tensor.exp_avg_sq, expected)
    assert all(len(set(ranks)) == 2 for ranks in expected.view(9, 256)[:, 1:].T.tolist())


def zero_8bit(gradient: Tensor, block_size: int = 256) -> AdamwTensor:
    codes = [torch.full((gradient.numel(),), zero, dtype=torch.uint8) for zero in (127, 0)]
    absmax = [torch.zeros(-(-gradient.numel() // block_size)) for _ in range(2)]
    return AdamwTensor(torch.zeros_like(gradient), gradient, *codes, *absmax, 0.0)


@pytest.mark.parametrize("block_size", [None, 32, 64])
def test_zero_gradients_leave_parameters_alone(library: ctypes.CDLL, block_size: int | None) -> None:
    tensor = zero_8bit(torch.zeros(77), block_size or 32)
    if block_size is None:
        tensor = AdamwTensor(torch.zeros(77), torch.zeros(77), torch.zeros(77), torch.zeros(77), None, None, 0.0)
    parameter = torch.randn(77, generator=torch.Generator().manual_seed(0))
    tensor = tensor._replace(parameter=parameter.clone())
    NativeKernels(library).update([tensor], replace(STEP, block_size=block_size or 32))
    assert_same_bits(tensor.parameter, parameter)
    assert tensor.exp_avg.float().eq(127 if block_size else 0).all()
    assert tensor.exp_avg_sq.eq(0).all()


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_block_alone(
    library: ctypes.CDLL, value: float, block_size: int
) -> None:
    gradient = torch.randn(200, generator=torch.Generator().manual_seed(0))
    gradient[70] = value
    step, spoilt, blocks = replace(STEP, block_size=block_size), 70 // block_size, -(-200 // block_size)
    tensors = [zero_8bit(gradient, block_size), zero_8bit(gradient.nan_to_num(0.0, 0.0, 0.0), block_size)]
    assert_updates_alike(NativeKernels(library), tensors, step)
    NativeKernels(library).update(tensors, step)
    assert tensors[0].exp_avg_absmax.isfinite().tolist() == [i != spoilt for i in range(blocks)]
    tensors[0].gradient.zero_()
    NativeKernels(library).update(tensors, step)
    assert tensors[0].parameter.isnan().view(-1).tolist() == [i // block_size == spoilt for i in range(200)]


@pytest.mark.parametrize("block_size", [32, 64])
def test_huge_and_tiny_blocks_equal_the_reference(library: ctypes.CDLL, block_size: int) -> None:
    """Absmax near the largest float and far below the smallest normal one."""
    generator = torch.Generator().manual_seed(5)
    gradients = [torch.randn(300, generator=generator) * scale for scale in (1e18, 5e37, 1e-20, 1e-38, 1e-43, 1e-45)]
    for gradient in gradients:
        gradient.clamp_(-3.4e38, 3.4e38)
    step = replace(STEP, block_size=block_size, gradient_scale=1.0)
    tensors = [zero_8bit(gradient, block_size) for gradient in gradients]
    assert_updates_alike(NativeKernels(library), tensors, step, steps=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradient_norm_equals_the_reference(library: ctypes.CDLL, threads: int) -> None:
    generator, guarded = torch.Generator().manual_seed(6), Guarded()
    gradients = [
        guarded.place(torch.randn(length, generator=generator) * 10**k, shift=k)
        for k, length in enumerate((0, 1, 5, 16, 4095, 0, 4097, 50001))
    ]
    norm, first_not_finite = NativeKernels(library, threads).gradient_norm(gradients, -0.25)
    assert (norm, first_not_finite) == adamw.gradient_norm(gradients, -0.25)
    exact = torch.cat(gradients).double().norm().item() / 4
    assert norm == pytest.approx(exact, rel=1e-14)  # 50,000 sums in double, in lanes
    guarded.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_gradient_that_is_not_finite_is_found(library: ctypes.CDLL, value: float) -> None:
    native = NativeKernels(library, threads=2)
    for length in (1, 17, 4097, 20000):
        for place in {0, length // 2, length - 1}:
            gradients = [torch.full((9000,), 3e38), torch.empty(0), torch.zeros(length), torch.full((5,), math.nan)]
            gradients[2][place] = value
            norm, first_not_finite = native.gradient_norm(gradients, 1.0)
            assert first_not_finite == 2
            assert not math.isfinite(norm)


def test_no_gradients(library: ctypes.CDLL) -> None:
    assert NativeKernels(library).gradient_norm([], 1.0) == (0.0, None)
    assert NativeKernels(library).gradient_norm([torch.empty(0)], 1.0) == (0.0, None)
    NativeKernels(library).update([], STEP)


def test_bad_arguments_are_refused(library: ctypes.CDLL) -> None:
    native = NativeKernels(library, threads=2)
    values, codes, absmax = torch.ones(100), torch.zeros(100, dtype=torch.uint8), torch.zeros(4)
    tensor = AdamwTensor(values, values, values, values, None, None, 0.0)
    quantized = AdamwTensor(values, values, codes, codes, absmax, absmax, 0.0)
    good = [c_tensor(tensor)]
    assert native.status(good, -1, STEP) == BAD_SIZE
    assert native.status(None, 1, STEP) == NULL_POINTER
    assert native.status(good, 1, replace(STEP, step=0)) == BAD_SIZE
    for numel in (-1, 2**61, 2**63 - 1):
        huge = c_tensor(tensor)
        huge.numel = numel
        assert native.status([*good, huge], 2, STEP) == BAD_SIZE
    for dtype in (2, 3, -1):  # float16 is not among them
        other = c_tensor(tensor)
        other.dtype = dtype
        assert native.status([*good, other], 2, STEP) == BAD_DTYPE
    for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq"):
        broken = c_tensor(tensor)
        setattr(broken, name, None)
        assert native.status([*good, broken], 2, STEP) == NULL_POINTER
    for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        assert native.status([c_tensor(quantized._replace(**{name: None}))], 1, STEP) == NULL_POINTER
    for block_size in (-256, 0, 1, 16, 48, 8192, 2**40):
        step = replace(STEP, block_size=block_size)
        assert native.status([*good, c_tensor(quantized)], 2, step) == BAD_BLOCK_SIZE
    assert values.eq(1).all()  # refused before anything is written


def test_empty_tensors_may_have_no_memory(library: ctypes.CDLL) -> None:
    assert NativeKernels(library).status([AdamwView(), AdamwView()], 2, STEP) == OK


def test_the_norm_refuses_bad_arguments(library: ctypes.CDLL) -> None:
    native = NativeKernels(library)
    norm, first = ctypes.c_double(), ctypes.c_int64()
    without_gradient, too_long = (AdamwView * 1)(AdamwView(numel=5)), (AdamwView * 1)(AdamwView(numel=-5))
    assert native._norm(without_gradient, 1, 1.0, norm, first, 1) == NULL_POINTER
    assert native._norm(too_long, 1, 1.0, norm, first, 1) == BAD_SIZE
    assert native._norm(None, 1, 1.0, norm, first, 1) == NULL_POINTER
    assert native._norm(None, -1, 1.0, norm, first, 1) == BAD_SIZE
    assert native._norm(None, 0, 1.0, None, first, 1) == NULL_POINTER
    assert native._norm(None, 0, 1.0, norm, None, 1) == NULL_POINTER


@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizer_takes_the_same_steps_with_native_kernels(library: ctypes.CDLL, bits: int) -> None:
    results = []
    for kernels in (None, NativeKernels(library, threads=2)):
        generator = torch.Generator().manual_seed(7)
        parameters = [torch.randn(shape, generator=generator) for shape in ((70, 70), (5,), (64, 65))]
        optimizer = AdamW(parameters, lr=1e-2, bits=bits, kernels=kernels)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            norm, not_finite = optimizer.gradient_norm()
            assert not_finite is None
            optimizer.step(gradient_scale=min(1.0, 0.3 / norm))
        results.append(parameters)
    for reference, native in zip(*results, strict=True):
        assert_same_bits(native, reference)
