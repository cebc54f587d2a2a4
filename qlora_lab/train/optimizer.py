"""The optimizer of the trainable parameters."""

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lab.config.schema import OptimConfig
from qlora_lab.errors import TrainingError
from qlora_lab.ops.adamw.optimizer import AdamW, AdamwKernels
from qlora_lab.ops.native.adamw import NativeAdamw
from qlora_lab.ops.native.cuda_adamw import CudaAdamw
from qlora_lab.ops.native.cuda_pager import ManagedPager
from qlora_lab.ops.paging import PagedKernels, policy_for
from qlora_lab.ops.registry import CUDA_KERNELS, KERNELS

logger = logging.getLogger(__name__)

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

    Paged states need a GPU; elsewhere they are ordinary ones, with the same values, which is said once.
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
    devices = {parameter.device for parameter in parameters.values()}
    bits = 8 if config.name.endswith("8bit") else 32
    native = _native_kernels(devices)
    if config.name.startswith("paged_"):
        reason = why_not_paged(devices)
        library, streams = CUDA_KERNELS.library, CUDA_KERNELS.streams
        if reason is None and isinstance(native, CudaAdamw) and library is not None and streams is not None:
            (device,) = devices
            pager = ManagedPager(library, streams, device)
            policy = policy_for(torch.cuda.get_device_properties(device).total_memory)
            return AdamW(groups, **numbers, bits=bits, kernels=PagedKernels(native, pager, policy), memory=pager)
        _say_once(f"optim.name={config.name} trains with ordinary memory here: {reason}")
    if bits == 8:
        return AdamW(groups, **numbers, bits=8, kernels=native)
    if native is not None or any(parameter.dtype != torch.float32 for parameter in parameters.values()):
        return AdamW(groups, **numbers, kernels=native)  # torch's would keep states in bfloat16 too
    return TorchAdamW(groups, **numbers, fused=all(device.type in FUSED_DEVICES for device in devices))


def _native_kernels(devices: set[torch.device]) -> AdamwKernels | None:
    """Return what updates parameters on these devices, or None where only torch can."""
    if {device.type for device in devices} == {"cpu"} and KERNELS.library is not None:
        return NativeAdamw(KERNELS.library)
    library, streams = CUDA_KERNELS.library, CUDA_KERNELS.streams
    if len(devices) == 1 and next(iter(devices)).type == "cuda" and library is not None and streams is not None:
        return CudaAdamw(library, streams)
    return None


def why_not_paged(devices: set[torch.device]) -> str | None:
    """Return why states on these devices cannot page, or None."""
    if any(device.type != "cuda" for device in devices):
        return "the model is not on a GPU"
    if CUDA_KERNELS.library is None:
        return f"there are no CUDA kernels ({CUDA_KERNELS.reason})"
    if len(devices) != 1:
        return "the parameters lie on several GPUs"
    (device,) = devices
    properties = CUDA_KERNELS.library.device(torch.cuda.current_device() if device.index is None else device.index)
    return None if properties.concurrent_managed_access else "the driver does not move unified memory by pages"


@cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


def describe_optimizer(optimizer: AdamW | ScaledStep) -> str:
    """Return the name for the run's record, with the implementation that runs."""
    if isinstance(optimizer, AdamW):
        paged = "paged " if optimizer.is_paged else ""
        return f"AdamW, {paged}{optimizer.bits}-bit states ({'native' if optimizer.is_native else 'reference'})"
    fused = "fused" if optimizer.defaults.get("fused") else "one tensor at a time"
    return f"{type(optimizer).__name__.removeprefix('Torch')}, 32-bit states (torch, {fused})"
