"""Batches of rows under a budget of tokens."""

from collections.abc import Sequence


def budget_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group row numbers so that rows times the longest row of each batch stays within `batch_tokens`.

    Rows of like length share a batch, the longest first, so that too little memory shows at once. A row that
    is over the budget alone gets a batch of its own.

    Args:
        lengths: tokens of each row, padding and tokens to come included where they take memory.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches
