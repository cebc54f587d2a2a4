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

    def model(self, key: str | None, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Return the model of `key`, loading it unless it is the one that is kept; one without a key is not kept."""
        if self._base is None or self._key != key:
            self._base = None  # freed before the next one is loaded: both might not fit
            if key is None:
                return load()
            self._base, self._key = load(), key
        shared: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(self._base)}
        return copy.deepcopy(self._base, shared)


def base_key(config: RunConfig) -> str | None:
    """Return what two runs have in common when their base models are the same, as text.

    None for a run that trains more than adapters, so that the next one could not start from the same tensors.
    """
    adapter, model = config.adapter, config.model
    only_adapters = adapter.kind == "lora" and not adapter.trained_modules
    if not only_adapters or model.new_tokens or model.task == CLASSIFICATION:
        return None
    random = config.seed if model.source == "random" else None
    parts = asdict(model), asdict(config.quant), config.trainer.compute_dtype, config.trainer.device, random
    return json.dumps(parts, sort_keys=True)


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
