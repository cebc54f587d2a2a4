"""Paged states: what moves when, and that a step does not depend on it."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qlora_lab.ops.adamw.optimizer import AdamW, ReferenceKernels
from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor
from qlora_lab.ops.paging import PagedKernels, PagingPolicy, merge_ranges, policy_for


class FakePager:
    """Ordinary memory, and a list of what was asked for."""

    def __init__(self, free: int = 0) -> None:
        self.free = free
        self.log: list[str] = []
        self.names: dict[int, str] = {}
        self.made = 0

    def full(self, shape: torch.Size, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.made += 1
        return torch.full(shape, value, dtype=dtype, device=device)

    def free_bytes(self) -> int:
        return self.free

    def fetch(self, states: Sequence[Tensor]) -> None:
        self.log.append(f"fetch {sum(state.nbytes for state in states)}")

    def fetched(self) -> None:
        self.log.append("wait")

    def hand_back(self, states: Sequence[Tensor]) -> None:
        self.log.append(f"hand back {sum(state.nbytes for state in states)}")


class LoggedKernels(ReferenceKernels):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        self.log.append(f"update {len(tensors)}")
        super().update(tensors, step)


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, requires_grad=True) for size in (100, 5000, 30, 9000)]


def take_step(optimizer: AdamW, weights: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


def test_windows_hold_whole_tensors_in_order() -> None:
    policy = PagingPolicy(window_bytes=10, reserve_bytes=0)
    assert policy.windows([4, 6, 1, 30, 2, 3]) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert policy.windows([]) == []
    assert policy.windows([50]) == [range(1)]


def test_states_are_handed_back_where_memory_is_short() -> None:
    policy = policy_for(48 * 2**30)
    assert policy.reserve_bytes == 3 * 2**30
    assert policy.hands_back(2 * 2**30) and not policy.hands_back(4 * 2**30)


@pytest.mark.parametrize("free", [10**9, 0])
def test_the_next_window_is_fetched_before_this_one_is_updated(free: int) -> None:
    pager, weights = FakePager(free), parameters()
    kernels = PagedKernels(LoggedKernels(pager.log), pager, PagingPolicy(45_000, reserve_bytes=1))
    take_step(AdamW(weights, kernels=kernels, memory=pager), weights, seed=0)
    # two float states of 4 bytes: 800, 40000, 240 and 72000 bytes
    expected = [
        "fetch 41040",
        "fetch 72000",
        "wait",
        "update 3",
        "hand back 41040",
        "wait",
        "update 1",
        "hand back 72000",
    ]
    assert pager.log == [line for line in expected if not (free and line.startswith("hand"))]


@pytest.mark.parametrize("bits", [32, 8])
def test_paged_steps_are_those_of_ordinary_states(bits: int) -> None:
    ordinary, paged = parameters(), parameters()
    pager = FakePager()
    kernels = PagedKernels(ReferenceKernels(), pager, PagingPolicy(10_000, reserve_bytes=1))
    expected, optimizer = AdamW(ordinary, bits=bits), AdamW(paged, bits=bits, kernels=kernels, memory=pager)
    for seed in range(4):
        take_step(expected, ordinary, seed)
        take_step(optimizer, paged, seed)
    for weight, other in zip(ordinary, paged, strict=True):
        assert torch.equal(weight, other)
    assert optimizer.is_paged and not expected.is_paged
    assert pager.made == (8 if bits == 32 else 12)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_paged_run_resumes_bit_for_bit_from_ordinary_tensors(bits: int) -> None:
    straight = parameters()
    optimizer = AdamW(straight, bits=bits)
    for seed in range(3):
        take_step(optimizer, straight, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {"step", "exp_avg", "exp_avg_sq"} <= set(saved["state"][1])
    resumed = [weight.detach().clone().requires_grad_() for weight in straight]
    pager = FakePager()
    other = AdamW(resumed, bits=bits, kernels=PagedKernels(ReferenceKernels(), pager, policy_for(1)), memory=pager)
    other.load_state_dict(saved)
    assert pager.made > 0  # the loaded states lie in the pager's memory
    for seed in range(3, 6):
        take_step(optimizer, straight, seed)
        take_step(other, resumed, seed)
    for weight, expected in zip(resumed, straight, strict=True):
        assert torch.equal(weight, expected)
        for key, value in optimizer.state[expected].items():
            assert torch.equal(other.state[weight][key], value)


def test_neighbouring_ranges_move_together() -> None:
    assert merge_ranges([(1000, 24), (0, 100), (128, 50), (400, 8)], gap=64) == [(0, 178), (400, 8), (1000, 24)]
    assert merge_ranges([(0, 100), (10, 20)], gap=0) == [(0, 100)]
