"""One base model kept in memory for the runs of a process that share it: loading it is most of a short run."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qlora_lab.config.schema import CLASSIFICATION, RunConfig


class WarmBase:
    """Keeps the base model that was asked for last.

    What a run gets is a tree of modules of its own over the same tensors: adapters, hooks and modes that it adds are
    gone with it, and the weights, which adapters leave alone, are in memory once.
    """

    def __init__(self) -> None:
        self._key: str | None = None
        self._base: PreTrainedModel | None = None

    def model(self, key: str, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Return the model of `key`, loading it unless it is the one that is kept."""
        if self._base is None or self._key != key:
            self._base = None  # freed before the next one is loaded: both might not fit
            self._base, self._key = load(), key
        shared: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(self._base)}
        return copy.deepcopy(self._base, shared)


def leaves_base_unchanged(config: RunConfig) -> bool:
    """Say whether a run trains adapters and nothing else, so that the next one can start from the same tensors."""
    adapter, model = config.adapter, config.model
    only_adapters = adapter.kind == "lora" and not adapter.trained_modules
    return only_adapters and not model.new_tokens and model.task != CLASSIFICATION


def base_key(config: RunConfig) -> str:
    """Return what two runs have in common when their base models are the same, as text."""
    random = config.seed if config.model.source == "random" else None
    parts = asdict(config.model), asdict(config.quant), config.trainer.compute_dtype, config.trainer.device, random
    return json.dumps(parts, sort_keys=True)


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
