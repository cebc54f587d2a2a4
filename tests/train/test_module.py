"""One optimizer step: its gradient, its clipping, its metrics, and what stops it."""

import dataclasses
import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lab.data.batching import collate
from qlora_lab.errors import TrainingError
from qlora_lab.models.loss import row_losses, target_loss
from qlora_lab.train.checkpoint import Counters, TrainingState
from qlora_lab.train.loop import run_loop
from qlora_lab.train.module import TrainingModule
from qlora_lab.train.optimizer import ScaledStep
from qlora_lab.train.steps import StepDataset, step_loader

CPU = torch.device("cpu")


class ScaledSGD(ScaledStep, torch.optim.SGD):
    """Moves a weight by its rate times minus the scaled gradient."""


def take_steps(
    model: Any,
    examples: Any,
    plan: Sequence[Sequence[int]],
    *,
    micro_batch_size: int,
    max_grad_norm: float = 1e9,
    pack_tokens: int | None = None,
) -> TrainingModule:
    """Train with plain gradient descent of rate 1, so that weights move by minus the gradient."""
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    state = TrainingState(parameters, ScaledSGD(parameters.values(), lr=1.0), Counters())
    ticks = itertools.count()
    module = TrainingModule(
        model,
        state,
        learning_rate=lambda step: 1.0,
        max_grad_norm=max_grad_norm,
        loss_chunk_tokens=4,
        clock=lambda: float(next(ticks)),
    )
    steps = StepDataset(examples, plan, 0, micro_batch_size, pad_id=0, pack_tokens=pack_tokens)
    with step_loader(steps, CPU) as batches:
        run_loop(module, batches, callbacks=[], device=CPU)
    return module


def gradient_of_one_big_batch(model: Any, examples: Any, rows: Sequence[int]) -> dict[str, Tensor]:
    """Let transformers work out the gradient of the mean loss over all target tokens."""
    model(**collate([examples[row] for row in rows], 0)).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return gradients


def trained(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_nothing_of_a_micro_batch_lives_on_into_the_next(
    make_model: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[weakref.ref[Tensor]] = []

    def watched(*arguments: Any) -> tuple[Tensor, int]:
        assert all(reference() is None for reference in losses)
        loss, tokens = target_loss(*arguments)
        losses.append(weakref.ref(loss))
        return loss, tokens

    monkeypatch.setattr("qlora_lab.train.module.target_loss", watched)
    take_steps(make_model(), examples, [range(6)], micro_batch_size=2)
    assert len(losses) == 3


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_the_gradient_is_that_of_one_big_batch(make_model: Any, examples: Any, micro_batch_size: int) -> None:
    rows = list(range(8))
    assert len({examples[row].target_tokens for row in rows}) > 2, "the rows must differ in target tokens"
    model = make_model()
    expected = gradient_of_one_big_batch(model, examples, rows)
    before = trained(model)
    module = take_steps(model, examples, [rows], micro_batch_size=micro_batch_size)
    for name, weight in trained(model).items():
        # gradients of about 0.01 to 1, in float32, summed in another order
        torch.testing.assert_close(before[name] - weight, expected[name], rtol=1e-4, atol=2e-6)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    assert module.metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_gradients_are_clipped_to_the_largest_norm(make_model: Any, examples: Any) -> None:
    rows = list(range(8))
    model = make_model()
    expected = gradient_of_one_big_batch(model, examples, rows)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    before = trained(model)
    module = take_steps(model, examples, [rows], micro_batch_size=4, max_grad_norm=norm / 10)
    for name, weight in trained(model).items():
        torch.testing.assert_close(before[name] - weight, expected[name] / 10, rtol=1e-3, atol=2e-6)
    assert module.metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4), "the norm before clipping"


def test_metrics_count_what_was_trained_on(make_model: Any, examples: Any) -> None:
    model = make_model()
    expected_loss = model(**collate(examples[4:8], 0)).loss.item()
    single = take_steps(model, examples, [[4, 5, 6, 7]], micro_batch_size=2)
    assert single.metrics["train/loss"] == pytest.approx(expected_loss, rel=1e-5), "the loss before the step"
    module = take_steps(make_model(), examples, [[0, 1, 2, 3], [4, 5, 6, 7]], micro_batch_size=2)
    lengths = [example.length for example in examples]
    assert module.metrics["train/tokens"] == sum(lengths[:8])
    assert module.metrics["train/target_tokens"] == sum(example.target_tokens for example in examples[:8])
    assert module.metrics["train/step_time_s"] == 1.0
    assert module.metrics["train/tokens_per_s"] == sum(lengths[4:8])
    assert module.metrics["train/learning_rate"] == 1.0


def test_a_gradient_that_is_not_finite_stops_training_before_the_weights_move(make_model: Any, examples: Any) -> None:
    model = make_model()
    bad = "model.layers.1.self_attn.q_proj.weight"
    model.get_parameter(bad).register_hook(lambda gradient: gradient * float("nan"))
    before = trained(model)
    with pytest.raises(TrainingError, match=rf"step 1: the gradient of {bad} is not finite \(nan\)"):
        take_steps(model, examples, [[0, 1]], micro_batch_size=2)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(model).items())


def test_a_loss_that_is_not_finite_stops_training(make_model: Any, examples: Any) -> None:
    model = make_model()
    model.model.norm.weight.data[0] = float("inf")
    before = trained(model)
    with pytest.raises(TrainingError, match="step 1: loss is not finite"):
        take_steps(model, examples, [[0, 1]], micro_batch_size=2)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(model).items())


def test_a_loss_that_reaches_no_parameter_stops_training(make_model: Any, examples: Any) -> None:
    model = make_model(trainable=())
    unused = torch.nn.Parameter(torch.ones(2, 2))
    model.register_parameter("unused", unused)
    with pytest.raises(TrainingError, match="no gradient can reach"):
        take_steps(model, examples, [[0, 1]], micro_batch_size=2)


def test_a_step_without_targets_stops_training(make_model: Any, examples: Any) -> None:
    empty = [dataclasses.replace(example, loss_start=example.length) for example in examples]
    with pytest.raises(TrainingError, match="step 1 has no target token"):
        take_steps(make_model(), empty, [[0, 1]], micro_batch_size=2)


def test_parameters_that_no_gradient_reaches_are_named_once(
    make_model: Any, examples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2, 2)))
    take_steps(model, examples, [[0, 1], [2, 3]], micro_batch_size=2)
    assert caplog.messages == ["no gradient reached 1 of 5 trainable parameters in the first step, such as unused"]


@pytest.mark.parametrize("pack_tokens", [None, 100])
def test_the_loss_of_each_length_is_recorded_apart(make_model: Any, examples: Any, pack_tokens: int | None) -> None:
    lengths = [4, 40, 12, 33, 70, 64]
    rows = [
        dataclasses.replace(examples[0], input_ids=[1 + (length * place) % 60 for place in range(length)])
        for length in lengths
    ]
    model = make_model(max_position_embeddings=128)
    sums, counts = row_losses(model, collate(rows, 0), 4)
    expected = {}
    for name, chosen in {"len_le_32": [0, 2], "len_le_64": [1, 3, 5], "len_le_128": [4]}.items():
        expected[f"train/loss_{name}"] = float(sums[chosen].sum() / counts[chosen].sum())
    module = take_steps(model, rows, [list(range(6))], micro_batch_size=4, pack_tokens=pack_tokens)
    found = {name: value for name, value in module.metrics.items() if name.startswith("train/loss_")}
    assert found == pytest.approx(expected, rel=1e-4)
