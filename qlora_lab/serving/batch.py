"""The rows that a model writes at the moment, with what it remembers of them; rows join and leave between steps."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from qlora_lab.data.batching import left_pad
from qlora_lab.models.head_products import whole_head_inputs
from qlora_lab.serving.shared_base import SharedBase


class Batch:
    """Rows with adapters of their own, written one token a step.

    Keys and values of all rows lie in one cache, (rows, heads, places, head size), each row padded on the left to the
    longest: the newest token of every row has the last place. A mask tells padding, and a token's position is the
    number of the row's own tokens before it, so that padding can be added where a longer row joins and taken away
    when it leaves. Both copy the cache; so does every step, since transformers' cache grows by concatenation. A row
    takes the memory of the longest one.

    Layers with a sliding window keep all places here; their masks leave out what lies outside.
    """

    def __init__(self, shared: SharedBase) -> None:
        self._shared = shared
        self._model: Any = shared.model
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._adapters: list[str | None] = []
        self._cache: Any = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._model.device)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def is_whole(self) -> bool:
        """Whether every layer remembers all rows and places; not so after a step that failed in the middle."""
        return not self._adapters or all(
            (states.shape[0], states.shape[2]) == self._mask.shape
            for layer in self._cache.layers
            for states in (layer.keys, layer.values)
        )

    @property
    def cache_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    @property
    def adapters(self) -> set[str]:
        """Those of the rows."""
        return {name for name in self._adapters if name is not None}

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> Tensor:
        """Read prompts, which become the last rows.

        Args:
            prompts: token ids of each; none is empty.
            adapters: of each; None: the base alone.

        Returns:
            (prompts, vocabulary) logits of the first token to write.
        """
        inputs = left_pad(prompts, pad_id=0)
        mask = inputs["attention_mask"].to(self._model.device)
        cache: Any = DynamicCache()
        logits = self._forward(inputs["input_ids"].to(self._model.device), mask, cache, adapters)
        if self._adapters:
            places = max(self._mask.shape[1], mask.shape[1])
            for mine, new in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_widened(mine.keys, places), _widened(new.keys, places)])
                mine.values = torch.cat([_widened(mine.values, places), _widened(new.values, places)])
            self._mask = torch.cat([functional.pad(own, (places - own.shape[1], 0)) for own in (self._mask, mask)])
        else:
            self._cache, self._mask = cache, mask
        self._adapters += adapters
        return logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Take in the token that was written to each row; return (rows, vocabulary) logits of the next."""
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        return self._forward(
            torch.tensor(tokens, device=self._mask.device)[:, None], self._mask, self._cache, self._adapters
        )

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows leave, and the padding that no row needs any more."""
        self._adapters = [self._adapters[row] for row in rows]
        if not rows:
            self._cache, self._mask = DynamicCache(), self._mask[:0, :0]
            return
        kept = torch.tensor(rows, device=self._mask.device)
        self._mask = self._mask[kept]
        unused = self._mask.shape[1] - int(self._mask.sum(1).max())
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, unused:], layer.values[kept, :, unused:]

    def _forward(self, input_ids: Tensor, mask: Tensor, cache: Any, adapters: Sequence[str | None]) -> Tensor:
        positions = {}
        if self._takes_positions:
            own = (mask.cumsum(1) - 1).clamp(min=0)
            positions = {"position_ids": own[:, -input_ids.shape[1] :]}
        with self._shared.rows(adapters), whole_head_inputs(self._model):
            output = self._model(
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **positions,
            )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def _widened(states: Tensor, places: int) -> Tensor:
    """Pad (rows, heads, places, head size) on the left."""
    return functional.pad(states, (0, 0, places - states.shape[2], 0))


def cache_bytes_per_token(shared: SharedBase) -> int:
    """Return what a batch remembers of one token, as the model itself shows on one."""
    batch = Batch(shared)
    batch.join([[0]], [None])
    return batch.cache_bytes
