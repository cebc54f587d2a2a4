"""The optimizer of the trainable parameters."""

from collections.abc import Mapping

import torch
from torch import nn

from qlora_lab.config.schema import OptimConfig
from qlora_lab.errors import TrainingError

FUSED_DEVICES = ("cpu", "cuda")  # where torch has one kernel for the update of all tensors


def build_optimizer(config: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW over named parameters; matrices decay, vectors (biases and norm weights) do not.

    The learning rate is the configured one; the schedule sets it anew before each step.

    Raises:
        TrainingError: there is nothing to train.
    """
    if not parameters:
        raise TrainingError("there is no trainable parameter; set adapter.kind=lora, or none to train every weight")
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(parameter.device.type in FUSED_DEVICES for parameter in parameters.values()),
    )


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Return the name for the run's record, with the implementation that runs: 'adamw (fused)'."""
    kind = "fused" if optimizer.defaults.get("fused") else "one tensor at a time"
    return f"{type(optimizer).__name__.lower()} ({kind})"
