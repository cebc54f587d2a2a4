"""Unified memory: its slabs on this machine, and on a GPU states that page, which no step may show."""

import copy
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lab.errors import KernelError
from qlora_lab.ops.adamw.optimizer import AdamW
from qlora_lab.ops.native.cuda_adamw import CudaAdamw
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_pager import HOST, NOWHERE, ManagedPager, Pages, Slab
from qlora_lab.ops.native.cuda_streams import Streams
from qlora_lab.ops.paging import PagedKernels, PagingPolicy
from qlora_lab.ops.registry import CUDA_KERNELS
from qlora_lab.train.optimizer import why_not_paged

gpu = pytest.mark.gpu
WHY_NOT = why_not_paged({torch.device("cuda", 0)})
no_gpu = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
SHAPES = ((64, 4096), (5000,), (16, 16), (700, 1024))


def test_a_slab_hands_out_aligned_pieces_of_its_memory(emulated: CudaLibrary) -> None:
    slab = Slab(emulated, 4096, device=0)
    addresses = [slab.take(size) for size in (1, 256, 300)]
    assert [address - slab.address for address in addresses] == [0, 256, 512]
    assert slab.left == 4096 - 256 - 256 - 512
    ctypes.memset(slab.address, 0x5A, 4096)
    assert ctypes.string_at(addresses[2], 300) == b"\x5a" * 300


def test_memory_that_is_refused_fails_no_launch_after_it(emulated: CudaLibrary, streams: Streams) -> None:
    with pytest.raises(KernelError, match="qlk_cuda_managed_allocate: out of memory"):
        Slab(emulated, 2**60, device=0)
    packed, _ = CudaOps(emulated, streams).quantize_blockwise(torch.zeros(64), "nf4", 64)
    assert packed.numel() == 32


def parameters(device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in SHAPES]


def take_steps(optimizer: AdamW, weights: list[Tensor], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
        assert optimizer.gradient_norm()[1] is None
        optimizer.step(gradient_scale=0.5)


class EmulatedPager:
    """`ops.paging.Pager` of the emulated device, which has one queue."""

    def __init__(self, library: CudaLibrary) -> None:
        self.pages = Pages(library, 0)
        self.seen: list[list[int]] = []  # where states had been sent when their update began

    def full(self, shape: torch.Size, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        slab, address = self.pages.take(shape.numel() * dtype.itemsize)
        memory = (ctypes.c_byte * (shape.numel() * dtype.itemsize)).from_address(address)
        memory.slab = slab  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=dtype).view(shape).fill_(value)

    def free_bytes(self) -> int:
        return 0

    def fetch(self, states: Sequence[Tensor]) -> None:
        self.pages.send(states, 0, stream=0)
        self.seen.append([self.pages.location(state)[1] for state in states])

    def fetched(self) -> None:
        """Everything is in order."""

    def hand_back(self, states: Sequence[Tensor]) -> None:
        self.pages.send(states, HOST, stream=0)


def states_of(optimizer: AdamW) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("reserve_bytes", "place"), [(0, 0), (2**62, HOST)], ids=["they stay", "they go back"])
def test_where_pages_are_after_a_step(
    emulated: CudaLibrary, streams: Streams, bits: int, reserve_bytes: int, place: int
) -> None:
    pager, weights = EmulatedPager(emulated), parameters("cpu")
    policy = PagingPolicy(window_bytes=2**18, reserve_bytes=reserve_bytes)
    optimizer = AdamW(
        weights, bits=bits, kernels=PagedKernels(CudaAdamw(emulated, streams), pager, policy), memory=pager
    )
    expected = AdamW([weight.detach().clone().requires_grad_() for weight in weights], bits=bits)
    take_steps(optimizer, weights, range(2))
    take_steps(expected, expected.param_groups[0]["params"], range(2))
    assert [pager.pages.location(state) for state in states_of(optimizer)] == [(0, place)] * len(states_of(optimizer))
    assert len(pager.seen) > 2 and all(sent == [0] * len(sent) for sent in pager.seen)
    for weight, other in zip(weights, expected.param_groups[0]["params"], strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_checkpoint_holds_ordinary_tensors_and_training_goes_on_bit_for_bit(
    emulated: CudaLibrary, streams: Streams, tmp_path: Path, bits: int
) -> None:
    """From states in unified memory, through a file, to states in ordinary memory, and back."""
    files = pytest.importorskip("qlora_lab.train.checkpoint")  # a machine with a GPU may lack what it needs
    rng = pytest.importorskip("qlora_lab.train.rng")

    def state(paged: bool) -> Any:
        weights = dict(zip("abcd", map(nn.Parameter, parameters("cpu")), strict=True))
        pager, kernels = EmulatedPager(emulated), CudaAdamw(emulated, streams)
        options: dict[str, Any] = {"kernels": kernels}
        if paged:
            policy = PagingPolicy(window_bytes=2**18, reserve_bytes=2**62)
            options = {"kernels": PagedKernels(kernels, pager, policy), "memory": pager}
        return files.TrainingState(weights, AdamW(weights.values(), bits=bits, **options), files.Counters(2))

    straight, folders = state(paged=True), iter((tmp_path / "first", tmp_path / "second"))
    weights = list(straight.parameters.values())
    take_steps(straight.optimizer, weights, range(2))
    resumed = straight
    for paged, seeds in ((False, range(2, 4)), (True, range(4, 6))):
        folder = next(folders)
        files.save_checkpoint(folder, resumed, rng.capture_rng(), keep=1)
        found = files.load_newest(folder)
        assert found is not None and {"exp_avg", "exp_avg_sq", "step"} <= set(found.optimizer["a"])
        resumed = state(paged)
        resumed.restore(found)
        assert resumed.optimizer.is_paged == paged
        take_steps(resumed.optimizer, list(resumed.parameters.values()), seeds)
        take_steps(straight.optimizer, weights, seeds)
        for name, weight in straight.parameters.items():
            assert torch.equal(resumed.parameters[name], weight)
            for key, value in straight.optimizer_tensors()[name].items():
                assert torch.equal(resumed.optimizer_tensors()[name][key], value)


def test_pages_that_were_sent_to_different_places_are_nowhere(emulated: CudaLibrary) -> None:
    pager = EmulatedPager(emulated)
    state = pager.full(torch.Size([4096]), 0, torch.float32, torch.device("cpu"))
    assert pager.pages.location(state) == (0, NOWHERE)
    pager.fetch([state])
    assert pager.pages.location(state) == (0, 0)
    pager.hand_back([state[:100]])
    assert pager.pages.location(state) == (0, NOWHERE)
    with pytest.raises(KernelError, match="qlk_cuda_managed_location: invalid argument"):
        pager.pages.location(torch.zeros(10))


def paged(weights: list[Tensor], bits: int, reserve_bytes: int) -> AdamW:
    assert CUDA_KERNELS.library is not None and CUDA_KERNELS.streams is not None
    pager = ManagedPager(CUDA_KERNELS.library, CUDA_KERNELS.streams, torch.device("cuda", 0))
    kernels = CudaAdamw(CUDA_KERNELS.library, CUDA_KERNELS.streams)
    return AdamW(
        weights,
        bits=bits,
        kernels=PagedKernels(kernels, pager, PagingPolicy(window_bytes=2**20, reserve_bytes=reserve_bytes)),
        memory=pager,
    )


@gpu
@no_gpu
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("reserve_bytes", [0, 2**62], ids=["states stay", "states go back"])
def test_paged_states_on_a_gpu_are_those_of_the_cpu(bits: int, reserve_bytes: int) -> None:
    weights = parameters()
    on_cpu = [weight.detach().cpu().requires_grad_() for weight in weights]
    optimizer, expected = paged(weights, bits, reserve_bytes), AdamW(on_cpu, bits=bits)
    take_steps(optimizer, weights, range(4))
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for weight in on_cpu:
            weight.grad = torch.randn(weight.shape, generator=generator)
        expected.step(gradient_scale=0.5)
    for weight, other in zip(weights, on_cpu, strict=True):
        assert torch.equal(weight.cpu(), other)
        for key, value in expected.state[other].items():
            assert torch.equal(optimizer.state[weight][key].cpu(), value)


@gpu
@no_gpu
@pytest.mark.parametrize(("reserve_bytes", "place"), [(0, 0), (2**62, HOST)], ids=["they stay", "they go back"])
def test_where_pages_are_after_a_step_on_a_gpu(reserve_bytes: int, place: int) -> None:
    weights = parameters()
    optimizer = paged(weights, 32, reserve_bytes)
    take_steps(optimizer, weights, range(2))
    torch.cuda.synchronize()
    assert CUDA_KERNELS.library is not None
    pages = Pages(CUDA_KERNELS.library, 0)
    assert [pages.location(state) for state in states_of(optimizer)] == [(0, place)] * len(states_of(optimizer))


@gpu
@no_gpu
def test_a_paged_run_resumes_bit_for_bit_on_a_gpu() -> None:
    weights = parameters()
    optimizer = paged(weights, 8, 2**62)
    take_steps(optimizer, weights, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [weight.detach().clone().requires_grad_() for weight in weights]
    take_steps(optimizer, weights, range(2, 4))
    other = paged(resumed, 8, 0)
    other.load_state_dict(saved)
    take_steps(other, resumed, range(2, 4))
    for weight, expected in zip(resumed, weights, strict=True):
        assert torch.equal(weight, expected)


@gpu
@no_gpu
def test_the_configuration_pages_on_a_gpu() -> None:
    from qlora_lab.config.schema import OptimConfig
    from qlora_lab.train.optimizer import build_optimizer, describe_optimizer

    weight = nn.Parameter(torch.ones(64, 128, device="cuda"))
    optimizer = build_optimizer(OptimConfig(name="paged_adamw_8bit"), {"weight": weight})
    assert describe_optimizer(optimizer) == "AdamW, paged 8-bit states (native)"
