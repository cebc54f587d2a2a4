"""The states of the random number generators that training draws from (dropout, mostly)."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """States of torch's generators as (bytes,) uint8, of Python's and NumPy's as plain values for JSON."""

    torch_cpu: Tensor
    torch_cuda: Tensor | None  # of the current device; None where CUDA was not used
    python: list[Any]
    numpy: dict[str, Any]


def seed_everything(seed: int) -> None:
    """Seed every generator that training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA's generators too


def capture_rng() -> RngState:
    """Copy the present states."""
    version, words, gauss = random.getstate()
    numpy_state = dict(np.random.get_state(legacy=False))
    twister = dict(numpy_state["state"])
    return RngState(
        torch_cpu=torch.get_rng_state(),
        torch_cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        python=[version, list(words), gauss],
        numpy={**numpy_state, "state": {**twister, "key": twister["key"].tolist()}},
    )


def restore_rng(state: RngState) -> None:
    """Put captured states back."""
    version, words, gauss = state.python
    random.setstate((version, tuple(words), gauss))
    twister = dict(state.numpy["state"])
    twister["key"] = np.array(twister["key"], dtype=np.uint32)
    np.random.set_state({**state.numpy, "state": twister})
    torch.set_rng_state(state.torch_cpu)
    if state.torch_cuda is not None:
        torch.cuda.set_rng_state(state.torch_cuda)
