"""Batches of rows under a budget of tokens."""

from collections.abc import Sequence


def budget_batches(lengths: Sequence[int], batch_tokens: int, most_padding: int | None = None) -> list[list[int]]:
    """Group row numbers so that rows times the longest row of each batch stays within `batch_tokens`.

    Rows of like length share a batch, the longest first, so that too little memory shows at once. A row that
    is over the budget alone gets a batch of its own.

    Args:
        lengths: tokens of each row, padding and tokens to come included where they take memory.
        batch_tokens: most tokens in a batch, padding included.
        most_padding: of which so many are padding; None: any number.
    """
    batches: list[list[int]] = []
    longest = padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        padding += longest - lengths[row]
        fits = batches and (len(batches[-1]) + 1) * longest <= batch_tokens
        if fits and (most_padding is None or padding <= most_padding):
            batches[-1].append(row)
        else:
            batches.append([row])
            longest, padding = lengths[row], 0
    return batches
