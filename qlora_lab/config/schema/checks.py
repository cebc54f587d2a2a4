"""What the groups check their values with: each raises ConfigError in one sentence."""

import math
from typing import Any

from qlora_lab.errors import ConfigError, unknown_name

MISSING: Any = "???"  # what OmegaConf takes for "has no default"; its import would cost every worker 0.1 s
MAX_SEED = 2**32 - 1  # NumPy's largest


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_one_of(key: str, given: str, allowed: tuple[str, ...]) -> None:
    require(given in allowed, unknown_name(key, given, allowed))


def require_at_least(key: str, given: float | None, least: float) -> None:
    require(given is None or given >= least, f"{key} must be {least} or more; got {given}")


def require_above_zero(key: str, given: float) -> None:
    require(given > 0 and math.isfinite(given), f"{key} must be a finite number above 0; got {given}")


def require_seed(key: str, given: int) -> None:
    require(0 <= given <= MAX_SEED, f"{key} must be from 0 to {MAX_SEED}; got {given}")


def require_share(key: str, given: float, *, below_one: bool = False) -> None:
    inside = 0.0 <= given < 1.0 if below_one else 0.0 <= given <= 1.0
    top = "below 1" if below_one else "1"
    require(inside, f"{key} must be from 0 to {top}; got {given}")
