"""How many rows each source of a mix gives."""

from collections.abc import Mapping

from qlora_lab.errors import DataError


def rows_of_parts(
    weights: Mapping[str, float], available: Mapping[str, int], total: int | None, data_name: str
) -> dict[str, int]:
    """Return the rows to draw of each part of a mix.

    Args:
        weights: of each part, above zero; shares are the weights by their sum.
        available: rows of each part.
        total: rows of the mix; None: as many as the shares allow before a part runs out.
        data_name: for the error.

    Returns:
        By the name of the part; the counts add up to `total` and are off their exact share by less than one row.

    Raises:
        DataError: a part has fewer rows than its share.
    """
    if len(weights) == 1 and total is None:
        return dict(available)
    whole = sum(weights.values())
    shares = {name: weight / whole for name, weight in weights.items()}
    if total is None:
        total = min(int(available[name] / share) for name, share in shares.items())
    counts = {name: int(total * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - total * shares[name])  # the largest first
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if count > available[name]:
            most = min(int(available[other] / share) for other, share in shares.items())
            part = "" if len(weights) == 1 else f", {count} of them of part '{name}',"
            raise DataError(
                f"data.rows asks for {total} rows{part} but {available[name]} are left to train on after holding out "
                f"the evaluation rows and filtering {data_name}; try data.rows={most}, or data.rows=null for all"
            )
    return counts
