"""The bytes of an optimizer's states, and what of them has to be on a GPU."""

from qlora_lab.config.schema import RunConfig

FLOAT32_BYTES = 4
STATE_BLOCK = 256  # values of an 8-bit state that share one absmax
PAGED_BYTES = 2 * 64 * 2**20  # of paged states on the GPU at least: two windows (ops/paging.py)


def optimizer_bytes(config: RunConfig, parameters: int) -> int:
    """Return the bytes of both states of every trained parameter."""
    if config.optim.name.endswith("8bit"):
        return 2 * (parameters + -(-parameters // STATE_BLOCK) * FLOAT32_BYTES)
    return 2 * parameters * FLOAT32_BYTES


def on_card(config: RunConfig, states: int) -> int:
    """Return what of the optimizer's states has to be on the card: of paged ones little, if it comes to that."""
    paged = config.optim.name.startswith("paged_") and config.trainer.device == "cuda"
    return min(states, PAGED_BYTES) if paged else states
