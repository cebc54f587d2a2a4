"""Activations in the host's memory: the same bits, and only what checkpointing keeps is moved."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from qlora_lab.train.offload import ON_THEIR_WAY, OffloadedActivations
from tests.train.conftest import MakeModel

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


class LateCopies:
    """`offload.Copies` that happen only when they are waited for: whoever uses a target before finds NaN.

    Notes when a copy begins and when it is waited for, and how many are on their way at most.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.pending: list[tuple[int, Any, Any]] = []
        self.events: list[tuple[str, int]] = []
        self.begun = self.most = 0

    def begin(self, target: Tensor, source: Tensor) -> int:
        target.fill_(float("nan"))
        self.pending.append((self.begun, weakref.ref(target), weakref.ref(source)))
        self.events.append(("begin", self.begun))
        self.most = max(self.most, len(self.pending))
        self.begun += 1
        return self.begun - 1

    def wait(self, copied: int) -> None:
        self.events.append(("wait", copied))
        while self.pending and self.pending[0][0] <= copied:
            _, target, source = self.pending.pop(0)
            assert target() is not None and source() is not None, "memory was given away while it was copied"
            target().copy_(source())


class Watched(OffloadedActivations):
    """Notes the shapes of what is moved."""

    def __init__(self, model: LlamaForCausalLM, **options: Any) -> None:
        self.moved: list[tuple[int, ...]] = []
        super().__init__(model, **({} if model.device.type == "cuda" else {"copies": LateCopies}) | options)

    def _to_host(self, tensor: Tensor) -> Any:
        kept = super()._to_host(tensor)
        if not isinstance(kept, Tensor):
            self.moved.append(tuple(tensor.shape))
        return kept


def loss_and_gradients(model: LlamaForCausalLM, offloaded: OffloadedActivations | None) -> list[Tensor]:
    ids = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0)).to(model.device)
    model.zero_grad()
    if offloaded is None:
        loss = model(input_ids=ids, labels=ids).loss
    else:
        with offloaded:
            loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_gradients_are_the_same_and_the_input_of_every_layer_is_moved(make_model: MakeModel, device: str) -> None:
    model = make_model().to(device).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    of_hidden_states = 3 * 20 * model.config.hidden_size * 4
    # on a CPU everything counts as if it took a GPU's memory
    watched = Watched(model, is_on_card=lambda tensor: True, smallest_bytes=of_hidden_states)
    expected = loss_and_gradients(model, None)
    for actual, value in zip(loss_and_gradients(model, watched), expected, strict=True):
        assert torch.equal(actual, value)
    layers = model.config.num_hidden_layers
    assert watched.moved.count((3, 20, model.config.hidden_size)) >= layers
    assert set(watched.moved).isdisjoint(tuple(weight.shape) for weight in model.parameters())
    small = Watched(model, is_on_card=lambda tensor: True, smallest_bytes=10**6)
    loss_and_gradients(model, small)
    elsewhere = Watched(model, smallest_bytes=0, is_on_card=lambda tensor: False)
    loss_and_gradients(model, elsewhere)
    assert small.moved == elsewhere.moved == []


LAYERS = 5


def kept_in_layers(weights: list[Tensor], x: Tensor, offloaded: OffloadedActivations) -> Tensor:
    """Return a sum that keeps the input of each of LAYERS layers, and only that."""
    with offloaded:
        for weight in weights:
            x = (x * weight).sin() + x  # the product keeps x and the weight, the sine its own input
        return x.sum()


@pytest.fixture
def copies() -> LateCopies:
    return LateCopies()


@pytest.fixture
def weights() -> list[Tensor]:
    return [torch.full((8, 8), 0.1 * number, requires_grad=True) for number in range(1, LAYERS + 1)]


def offloaded_with(copies: LateCopies, weights: list[Tensor]) -> OffloadedActivations:
    resident = torch.nn.ParameterList(weights)
    return OffloadedActivations(
        resident,  # type: ignore[arg-type]
        copies=lambda device: copies,
        is_on_card=lambda tensor: True,
        smallest_bytes=1,
    )


def test_copies_run_beside_the_computation_and_are_waited_for(copies: LateCopies, weights: list[Tensor]) -> None:
    x, offloaded = torch.randn(8, 8, requires_grad=True), offloaded_with(copies, weights)
    expected = torch.autograd.grad(kept_in_layers(weights, x, offloaded_with(LateCopies(), [])), weights)
    for _ in range(2):  # micro-batches
        copies.events.clear()
        first = copies.begun
        loss = kept_in_layers(weights, x, offloaded)
        kept = copies.begun - first
        out = copies.events[: 2 * kept]
        assert kept >= LAYERS and not copies.pending
        # the copy of a tensor is waited for when two more have left
        assert out[: 2 * ON_THEIR_WAY + 2] == [
            *(("begin", first + number) for number in range(ON_THEIR_WAY + 1)),
            *(("wait", first), ("begin", first + ON_THEIR_WAY + 1), ("wait", first + 1)),
        ]
        for actual, value in zip(torch.autograd.grad(loss, weights), expected, strict=True):
            assert torch.equal(actual, value)
        back = copies.events[2 * kept :]
        assert not copies.pending and len(back) == 2 * kept
        # while one that has come back is used, the next is on its way
        for number in range(first + kept, first + 2 * kept - 1):
            assert back.index(("begin", number + 1)) < back.index(("wait", number))
    assert copies.most == ON_THEIR_WAY + 1  # the third one before the first is waited for


def test_a_graph_is_gone_through_twice(copies: LateCopies, weights: list[Tensor]) -> None:
    x = torch.randn(8, 8, requires_grad=True)
    loss = kept_in_layers(weights, x, offloaded_with(copies, weights))
    once, again = (torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2))
    for actual, value in zip(again, once, strict=True):
        assert torch.equal(actual, value)


def test_what_a_backward_pass_left_on_its_way_is_waited_for(copies: LateCopies, weights: list[Tensor]) -> None:
    """An error in the middle: the memory of a copy that was begun is nobody's until it is done."""
    x, offloaded = torch.randn(8, 8, requires_grad=True), offloaded_with(copies, weights)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("in the middle")

    with offloaded:
        middle = (x * weights[0]).sin() * weights[1]
        middle.register_hook(fail)
        loss = (middle.sin() * weights[2]).sum()
    with pytest.raises(RuntimeError, match="in the middle"):
        loss.backward()
    assert copies.pending
    del loss, middle
    torch.autograd.grad(kept_in_layers(weights, x, offloaded), weights)
    assert not copies.pending
