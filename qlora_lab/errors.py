"""Errors that a user can act on: each says what was given, what is allowed, and what to try."""

import difflib
from collections.abc import Iterable


class QloraLabError(Exception):
    """Base of every error this project raises on purpose; command lines print it as one sentence."""


class ConfigError(QloraLabError):
    """A configuration that cannot mean anything; raised before anything is loaded."""


class DataError(QloraLabError):
    """A data source that is missing, broken or empty."""


class ModelError(QloraLabError):
    """A model that is missing, damaged or of another shape than its configuration says."""


class ShapeError(QloraLabError):
    """Tensors whose sizes do not belong together."""


class KernelError(QloraLabError):
    """Native kernels that cannot be loaded, or that refuse their arguments."""


class TrainingError(QloraLabError):
    """Training that cannot go on, such as a loss that is not finite."""


class RunFolderError(QloraLabError):
    """A run folder that cannot be read, written or resumed."""


class LeaseLostError(RunFolderError):
    """An attempt at a run that another one has taken over; what it writes late is refused."""


class RunFailedError(QloraLabError):
    """A run that failed, told to whoever decides what becomes of the others: Hydra's own sweepers."""


class LaunchError(QloraLabError):
    """Runs that could not be handed to their launcher."""


class JudgeError(QloraLabError):
    """A judge that cannot be asked now, or that must not be asked further."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown_name(key: str, given: str, allowed: Iterable[str]) -> str:
    """Word the refusal of a name: the key, what was given, what is allowed, the nearest.

    Example:
        >>> unknown_name("quant.format", "nf5", ["nf4", "none"])
        "quant.format must be one of nf4, none; got 'nf5'; did you mean 'nf4'?"
    """
    names = list(allowed)
    return f"{key} must be one of {', '.join(names)}; got '{given}'{nearest(given, names)}"
