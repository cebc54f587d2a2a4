"""Numbers that no training leaves in a weight, and the file they came from.

A flipped bit of a weight is mostly a number like any other. Only that of an exponent's highest bit, one in 16 of
bfloat16 and float16, stands out; all others are found by a checksum alone (models/checksums.py).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qlora_lab.errors import ModelError

# A weight is absurd that is both. Trained outliers are some 100 times the median and below 10; where most of a layer is
# dead, its other weights are far above the median and small.
LARGEST_WEIGHT, LARGEST_SHARE = 16.0, 1000.0
LARGEST_SHARE_OF_VECTORS = 10_000.0  # biases of attention keys have outliers of some hundreds beside small ones


def check_magnitudes(absmax: Tensor, largest_share: float = LARGEST_SHARE) -> None:
    """Refuse a weight by the largest magnitudes of its parts.

    Args:
        absmax: of each block, or of each row, or the magnitudes themselves; of any shape.
        largest_share: that the largest may be of the median.

    Raises:
        ModelError: one is NaN or infinite, or absurd beside the others.
    """
    if not absmax.numel():
        return
    largest = float(absmax.max())  # NaN where there is one
    if not largest < float("inf"):
        raise ModelError("the weight holds NaN or infinite values; is the checkpoint damaged?")
    if largest <= LARGEST_WEIGHT:
        return
    median = float(absmax[absmax > 0].median())
    if largest > largest_share * median:
        raise ModelError(
            f"the weight holds a value of magnitude {largest:.3g} where {median:.3g} is usual, as a flipped bit makes "
            "it; is the checkpoint damaged?"
        )


def file_of_weight(files: Sequence[str | Path], name: str) -> str | None:
    """Return the name of the one file of a checkpoint that holds a weight; None where no index says which.

    Args:
        name: of the weight in the model, which may have another prefix in the files.
    """
    if len(files) == 1:
        return Path(files[0]).name
    for index in Path(files[0]).parent.glob("*.index.json") if files else ():
        for held, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if name == held or name.endswith(f".{held}") or held.endswith(f".{name}"):
                return str(file)
    return None
