"""The items of a benchmark, read from where its configuration says, and what it found out about them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qlora_lab.config.schema import RowsConfig
from qlora_lab.data.records import BrokenRowError, BrokenRows
from qlora_lab.data.sources import origin_of, read_records
from qlora_lab.errors import DataError

Item = TypeVar("Item")
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class BenchmarkScores:
    """Metrics by the last part of their names, and a record of every item, in the order of the set."""

    metrics: dict[str, float]
    items: list[dict[str, Any]]


def read_items(
    source: RowsConfig,
    to_item: Callable[[Columns], Item | None],
    *,
    place: str,
    cache_dir: Path,
    data_dir: Path,
) -> list[Item]:
    """Read every row of a source as an item of a benchmark.

    Args:
        to_item: makes an item of a row's columns; None where the row holds none, such as a row without a label.
        place: where the source is configured, for errors.

    Raises:
        DataError: the source is missing or broken, a row is none of this benchmark's (named by its line), or
            there is no item at all.
    """
    origin = origin_of(source, data_dir, place)
    broken = BrokenRows(origin)
    items: list[Item] = []
    rows = 0
    for record in read_records(source, broken, cache_dir, data_dir, {}, place):
        rows += 1
        try:
            item = to_item(record.columns)
        except BrokenRowError as error:
            broken.add(record.place, str(error))
            continue
        if item is not None:
            items.append(item)
    broken.raise_if_any()
    if not items:
        reason = f"none of its {rows} rows has a label; try a split with labels" if rows else "it has no rows"
        raise DataError(f"{origin} holds nothing to ask: {reason} ({place})")
    return items


def spread(items: Sequence[Item], rows: int | None) -> dict[int, Item]:
    """Take `rows` items at equal distances over a set, all of them where it has no more, by their numbers."""
    if rows is None or rows >= len(items):
        return dict(enumerate(items))
    return {number: items[number] for number in (place * len(items) // rows for place in range(rows))}
