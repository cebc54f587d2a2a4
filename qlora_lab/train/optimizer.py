"""The optimizer of the trainable parameters."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lab.config.schema import OptimConfig
from qlora_lab.errors import TrainingError
from qlora_lab.ops.adamw import AdamW
from qlora_lab.ops.native.adamw import NativeAdamw
from qlora_lab.ops.registry import KERNELS

FUSED_DEVICES = ("cpu", "cuda")  # where torch has one kernel for the update of all tensors


class ScaledStep(torch.optim.Optimizer):
    """What training asks of an optimizer beyond torch's: the norm of all gradients, and a step that scales them."""

    def gradient_norm(self, gradient_scale: float = 1.0) -> tuple[float, Tensor | None]:
        """Return the norm of all gradients times |gradient_scale|, and the first parameter whose is not finite."""
        parameters = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm([weight.grad for weight in parameters])) * abs(gradient_scale)
        if math.isfinite(norm):
            return norm, None
        return norm, next((weight for weight in parameters if not weight.grad.isfinite().all()), None)

    def step(self, closure: Any = None, *, gradient_scale: float = 1.0) -> Any:
        """Scale the gradients in place, then update."""
        gradients = [weight.grad for group in self.param_groups for weight in group["params"]]
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], gradient_scale)
        return super().step(closure)


class TorchAdamW(ScaledStep, torch.optim.AdamW):
    """torch's AdamW: for GPUs, and where no native kernels are built."""


def build_optimizer(config: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> AdamW | TorchAdamW:
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
    groups = [group for group in groups if group["params"]]
    numbers: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    devices = {parameter.device.type for parameter in parameters.values()}
    native = NativeAdamw(KERNELS.library) if KERNELS.library is not None and devices == {"cpu"} else None
    if config.name == "adamw_8bit":
        return AdamW(groups, **numbers, bits=8, kernels=native)
    if native is not None:
        return AdamW(groups, **numbers, kernels=native)
    return TorchAdamW(groups, **numbers, fused=all(device in FUSED_DEVICES for device in devices))


def describe_optimizer(optimizer: AdamW | ScaledStep) -> str:
    """Return the name for the run's record, with the implementation that runs."""
    if isinstance(optimizer, AdamW):
        return f"AdamW, {optimizer.bits}-bit states ({'native' if optimizer.is_native else 'reference'})"
    fused = "fused" if optimizer.defaults.get("fused") else "one tensor at a time"
    return f"{type(optimizer).__name__.removeprefix('Torch')}, 32-bit states (torch, {fused})"
