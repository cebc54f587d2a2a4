import pytest
import torch
from torch import nn

from qlora_lab.config.schema import OptimConfig
from qlora_lab.errors import TrainingError
from qlora_lab.ops.adamw.optimizer import AdamW
from qlora_lab.ops.registry import KERNELS
from qlora_lab.train.optimizer import TorchAdamW, _say_once, build_optimizer, describe_optimizer


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = {"proj.weight": nn.Parameter(torch.ones(2, 2)), "norm.weight": nn.Parameter(torch.ones(2))}
    optimizer = build_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5), parameters)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameters["proj.weight"].data, torch.full((2, 2), 1 - 0.1 * 0.5))
    assert torch.equal(parameters["norm.weight"].data, torch.ones(2))


def test_the_configured_numbers_reach_the_optimizer() -> None:
    config = OptimConfig(learning_rate=3e-4, beta1=0.8, beta2=0.95, eps=1e-6)
    optimizer = build_optimizer(config, {"weight": nn.Parameter(torch.ones(2, 2))})
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
    kernels = "torch, fused" if KERNELS.library is None else "native"
    assert describe_optimizer(optimizer) == f"AdamW, 32-bit states ({kernels})"


def test_eight_bit_states_on_request() -> None:
    weight = nn.Parameter(torch.ones(64, 128))
    optimizer = build_optimizer(OptimConfig(name="adamw_8bit"), {"weight": weight})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8
    assert describe_optimizer(optimizer).startswith("AdamW, 8-bit states")


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_torchs_optimizer_takes_the_same_step_as_ours(scale: float) -> None:
    start, gradient = torch.randn(20, 30), torch.randn(20, 30)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    numbers = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    for optimizer, weight in ((AdamW([ours], **numbers), ours), (TorchAdamW([theirs], **numbers), theirs)):
        for _ in range(3):
            weight.grad = gradient.clone()
            norm, bad = optimizer.gradient_norm(scale)
            assert norm == pytest.approx(scale * gradient.norm().item(), rel=1e-5) and bad is None
            optimizer.step(gradient_scale=scale)
        weight.grad[3, 4] = torch.inf
        assert optimizer.gradient_norm(scale)[1] is weight
    torch.testing.assert_close(ours, theirs)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no trainable parameter"):
        build_optimizer(OptimConfig(), {})


@pytest.mark.parametrize(("name", "ordinary"), [("paged_adamw_32bit", "adamw"), ("paged_adamw_8bit", "adamw_8bit")])
def test_paged_states_are_ordinary_ones_without_a_gpu_and_it_is_said_once(
    name: str, ordinary: str, caplog: pytest.LogCaptureFixture
) -> None:
    _say_once.cache_clear()  # another test of this process may have heard it
    start, gradient = torch.randn(64, 128), torch.randn(64, 128)
    weights = []
    for config in (name, name, ordinary):
        weight = nn.Parameter(start.clone())
        optimizer = build_optimizer(OptimConfig(name=config), {"weight": weight})
        weight.grad = gradient.clone()
        optimizer.step()
        weights.append(weight)
    assert torch.equal(weights[0], weights[2])
    said = [record.message for record in caplog.records]
    assert said == [f"optim.name={name} trains with ordinary memory here: the model is not on a GPU"]
