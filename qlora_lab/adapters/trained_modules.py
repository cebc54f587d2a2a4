"""Modules that are trained as a whole beside the adapters: a classifier's new head, or the embeddings of new tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lab.config.placement import CLASSIFIER_HEADS
from qlora_lab.errors import ConfigError, nearest
from qlora_lab.quant.linear import QuantizedLinear


def heads_of_a_classifier(model: nn.Module) -> list[str]:
    return [name for name in CLASSIFIER_HEADS if hasattr(model, name)]


def train_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Train the modules called `names`, and the head of a classifier, in float32, so that small steps are not lost.

    In a model of 16 bits they take their inputs in float32 too, and give back what the model computes in.

    Args:
        names: paths, or last names that several modules may share.

    Raises:
        ConfigError: there is no such module, it has no parameters, or they are quantized.
    """
    compute_dtype = getattr(model, "dtype", torch.float32)
    heads = heads_of_a_classifier(model)
    trained: dict[int, nn.Parameter] = {}
    for name in [*heads, *names]:
        for module in _modules_called(model, name):
            trained |= {id(parameter): parameter for parameter in module.parameters()}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if compute_dtype == torch.float32:
        return
    for path, module in model.named_modules():
        if any(id(parameter) in trained for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_to_float32)
            if path.partition(".")[0] not in heads:  # its logits go into the loss as they are
                module.register_forward_hook(lambda _module, _inputs, output: _cast(output, compute_dtype))


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return what is trained besides adapters by its path: a classifier's head, and every module that holds a weight.

    Modules that share a weight, as embeddings and a tied head do, are all there.
    """
    heads = heads_of_a_classifier(model)
    found = {name: model.get_submodule(name) for name in heads}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        in_an_adapter = "lora_A" in own
        if path.partition(".")[0] not in heads and not in_an_adapter and any(p.requires_grad for p in own.values()):
            found[path] = module
    return found


def _modules_called(model: nn.Module, name: str) -> list[nn.Module]:
    called = {path: module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")}
    if not called:
        last_names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        raise ConfigError(
            f"adapter.trained_modules must name modules of the model; got '{name}'{nearest(name, last_names)}"
        )
    for path, module in called.items():
        if any(isinstance(part, QuantizedLinear) for part in module.modules()):
            raise ConfigError(
                f"adapter.trained_modules must not name quantized layers, which cannot move; got '{path}'"
            )
        if next(module.parameters(), None) is None:
            raise ConfigError(
                f"adapter.trained_modules must name modules with parameters; got '{path}', which has none"
            )
    return list(called.values())


def _to_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_cast(value, torch.float32) for value in inputs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
