"""Keys and values of a beginning that many rows share, worked out once."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


class SharedPrefix(Cache):
    """A cache of one row that stands before every row of a batch, and that no batch changes.

    Each layer's keys and values are expanded while that layer computes: a batch holds one layer's at a time, not all.
    """

    def __init__(self, prefix: Cache) -> None:
        super().__init__(layers=prefix.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values with those of the prefix before each row's own."""
        layer: Any = copy.copy(self.layers[layer_idx])
        layer.keys = layer.keys.expand(len(key_states), -1, -1, -1)
        layer.values = layer.values.expand(len(value_states), -1, -1, -1)
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values


@torch.inference_mode()
def shared_prefix(model: PreTrainedModel, token_ids: Sequence[int], device: torch.device) -> SharedPrefix:
    """Run a causal model over a beginning and keep its keys and values.

    Args:
        token_ids: of the beginning; not empty.
    """
    cache = DynamicCache(config=model.config)
    model.get_decoder()(input_ids=torch.tensor([list(token_ids)], device=device), past_key_values=cache, use_cache=True)
    return SharedPrefix(cache)
