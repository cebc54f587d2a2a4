"""Several comparisons at once.

Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

import math
from collections.abc import Sequence


def holm(p_values: Sequence[float], n_comparisons: int | None = None) -> list[float]:
    """Adjust p-values for being several: the i-th smallest of m times m - i + 1, never falling, at most 1.

    NaN (a comparison that cannot separate anyway) stays NaN and does not count in m.

    Args:
        n_comparisons: m, where more comparisons than these were open; those that are not made only raise the result.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    m = len(known) if n_comparisons is None else n_comparisons
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (m - rank)))
        adjusted[index] = largest
    return adjusted
