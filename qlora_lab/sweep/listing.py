"""Long lists cut to what a person reads."""

from collections.abc import Sequence

MOST_LISTED = 20


def listed(items: Sequence[str], most: int = MOST_LISTED, what: str = "more") -> list[str]:
    """Return the first items, and `and 980 more` where there are others; one that would stand alone is shown.

    Example:
        >>> listed(["a", "b", "c", "d"], most=2)
        ['a', 'b', 'and 2 more']
    """
    if len(items) <= most + 1:
        return list(items)
    return [*items[:most], f"and {len(items) - most:,} {what}"]
