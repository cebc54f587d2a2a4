import pytest
import torch
from torch import nn

from qlora_lab.config.schema import OptimConfig
from qlora_lab.errors import TrainingError
from qlora_lab.train.optimizer import build_optimizer, describe_optimizer


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
    assert describe_optimizer(optimizer) == "adamw (fused)"


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no trainable parameter"):
        build_optimizer(OptimConfig(), {})
