"""The largest micro-batch and the longest rows with which training fits a card."""

from collections.abc import Callable

from qlora_lab.config.schema import RunConfig
from qlora_lab.memory.layer import Shape
from qlora_lab.memory.plan import plan_memory

CARDS_GB = (16, 24, 40, 48, 80)
# Of a card, for the CUDA context and the allocator's slack; of a host, for the system: a rule of thumb, not measured.
RESERVED_GB = 1.0


def largest_rows(config: RunConfig, tokens: int, budget_bytes: float) -> int:
    """Return the most rows of `tokens` in a micro-batch; 0 where not one fits."""
    return _largest(lambda rows: plan_memory(config, Shape(rows, tokens)).training <= budget_bytes, 2**20)


def longest_tokens(config: RunConfig, rows: int, budget_bytes: float) -> int:
    """Return the longest rows that fit, up to model.max_length_tokens; 0 where none do."""
    most = config.model.max_length_tokens
    return _largest(lambda tokens: plan_memory(config, Shape(rows, tokens)).training <= budget_bytes, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` for which `fits` holds, as it does for all smaller ones."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
