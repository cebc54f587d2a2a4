"""The items of a benchmark, read from where its configuration says, and what it found out about them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qlora_lab.config.schema import RowsConfig
from qlora_lab.data.records import BrokenRowError, BrokenRows
from qlora_lab.data.sources import origin_of, read_records
from qlora_lab.errors import DataError
from qlora_lab.evaluation.benchmarks.likelihood import Advance

Item = TypeVar("Item")
Columns = Mapping[str, Any]


@dataclass(frozen=True)
class BenchmarkScores:
    """Metrics by the last part of their names, and a record of every item, in the order of the set."""

    metrics: dict[str, float]
    items: list[dict[str, Any]]


@dataclass(frozen=True)
class Ready:
    """A benchmark whose rows are read, checked and in tokens: what can be wrong with them has been said.

    Attributes:
        size: items to score, in the benchmark's own unit.
        score: asks the model; tells its argument how many more items are done.
    """

    size: int
    score: Callable[[Advance], BenchmarkScores]


@dataclass(frozen=True)
class ItemReader:
    """Reads the rows of one benchmark.

    Attributes:
        place: where the benchmark is configured, for errors.
        cache_dir: where fetched wheels lie.
        data_dir: where relative paths are looked up first.
        revisions: gets the commits of the hub sets that were read, by their ids.
    """

    place: str
    cache_dir: Path
    data_dir: Path
    revisions: dict[str, str] = field(default_factory=dict)

    def read(self, source: RowsConfig, to_item: Callable[[Columns], Item | None], key: str = "") -> list[Item]:
        """Read every row of a source as an item.

        Args:
            to_item: makes an item of a row's columns; None where the row holds none, such as a row without a label.
            key: of the source in the benchmark's configuration, where it is not the benchmark's own.

        Raises:
            DataError: the source is missing or broken, a row is none of this benchmark's (named by its line), or
                there is no item at all.
        """
        place = self.place + key
        origin = origin_of(source, self.data_dir, place)
        broken = BrokenRows(origin)
        items: list[Item] = []
        rows = 0
        for record in read_records(source, broken, self.cache_dir, self.data_dir, self.revisions, place):
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
