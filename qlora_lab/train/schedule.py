"""The learning rate of each step, as a factor of the configured rate."""

import math
from collections.abc import Callable

from qlora_lab.errors import ConfigError, unknown_name


def _constant(_progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def count_warmup_steps(total_steps: int, warmup_share: float) -> int:
    """Return the steps of the warm-up, rounded up: a share above 0 is at least one step."""
    return math.ceil(total_steps * warmup_share - 1e-9)  # 100 * 0.07 is 7.000000000000001


def scale(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Return the factor of the learning rate for the optimizer step `step`.

    Every schedule starts with the same warm-up, the constant one too:
    - `step` counts from 0 and is the step about to be taken; the last is `total_steps - 1`.
    - Step s of the warm-up has the factor (s + 1) / (warmup_steps + 1): the first step's rate is above 0,
      exactly `warmup_steps` steps lie below the full rate, and step `warmup_steps` is the first to have it.
    - A decay starts there with 1 and would reach 0 at step `total_steps`, one after the last, so the last
      step still trains.

    Example:
        >>> [scale(step, 4, 0, "linear") for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]

    Raises:
        ConfigError: there is no such schedule.
    """
    if schedule not in DECAYS:
        raise ConfigError(unknown_name("optim.schedule", schedule, DECAYS))
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return DECAYS[schedule]((step - warmup_steps) / (total_steps - warmup_steps))
