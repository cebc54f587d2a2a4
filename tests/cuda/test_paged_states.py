"""Unified memory: its slabs on this machine, and on a GPU states that page, which no step may show."""

import copy
import ctypes

import pytest
import torch
from torch import Tensor, nn

from qlora_lab.errors import KernelError
from qlora_lab.ops.adamw.optimizer import AdamW
from qlora_lab.ops.native.cuda_adamw import CudaAdamw
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps, Streams
from qlora_lab.ops.native.cuda_pager import ManagedPager, Slab
from qlora_lab.ops.paging import PagedKernels, PagingPolicy
from qlora_lab.ops.registry import CUDA_KERNELS

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(CUDA_KERNELS.library is None, reason=f"no GPU kernels: {CUDA_KERNELS.reason}")
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


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).cuda().requires_grad_() for shape in SHAPES]


def take_steps(optimizer: AdamW, weights: list[Tensor], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).cuda()
        assert optimizer.gradient_norm()[1] is None
        optimizer.step(gradient_scale=0.5)


def paged(weights: list[Tensor], bits: int, reserve_bytes: int) -> AdamW:
    assert CUDA_KERNELS.library is not None and CUDA_KERNELS.streams is not None
    pager = ManagedPager(CUDA_KERNELS.library, torch.device("cuda", 0))
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
    pytest.importorskip("omegaconf")  # a machine lent for its GPU may not have it
    from qlora_lab.config.schema import OptimConfig
    from qlora_lab.train.optimizer import build_optimizer, describe_optimizer

    weight = nn.Parameter(torch.ones(64, 128, device="cuda"))
    optimizer = build_optimizer(OptimConfig(name="paged_adamw_8bit"), {"weight": weight})
    assert describe_optimizer(optimizer) == "AdamW, paged 8-bit states (native)"
