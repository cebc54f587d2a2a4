"""A run's pool: the rows its training rows are drawn from, chosen and in tokens, in files that are read as needed.

What is in a pool does not depend on the run's seed, its number of rows, the weights of its mix or its share of wrong
answers, so the runs of a study that differ in those share one (see `token_cache`).
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qlora_lab.config.schema import HELD_OUT, OWN_PART, DataConfig, EvaluationConfig, RowsConfig, SourceConfig
from qlora_lab.data.filters import TRUNCATED, filter_rows, list_overlap
from qlora_lab.data.held_out import choose_evaluation_rows, content_order, overlap
from qlora_lab.data.procedural import procedural_rows
from qlora_lab.data.records import BrokenRows, texts_in
from qlora_lab.data.removed import Removed, RemovedRows
from qlora_lab.data.report import SetReport
from qlora_lab.data.row_file import RowFile, fields_of, read_row, row_of
from qlora_lab.data.rows import Row
from qlora_lab.data.sources import load_rows, origin_of, read_records, read_rows
from qlora_lab.data.tokenization import CUT, CUT_AWAY, ROWS_AT_ONCE, Encoder
from qlora_lab.errors import DataError

ROWS_FILE, TOKENS_FILE, CONTENTS_FILE = "rows.jsonl", "tokens.i32", "contents.json"
REMOVED_FILE = "removed.jsonl"


@dataclass(frozen=True)
class Folders:
    cache_dir: Path
    data_dir: Path


@dataclass
class Chosen:
    """What is known of a pool besides its rows.

    Attributes:
        held_out: the evaluation rows by the name of their set.
        train, evaluation: counts of the training sources and of each evaluation set, before anything is in tokens.
        overlap_removed: rows that ask what an evaluation row asks, by set, its own rows left out.
        removed: how many rows ask so, or were filtered out, by reason.
    """

    held_out: dict[str, list[Row]]
    train: SetReport
    evaluation: dict[str, SetReport]
    overlap_removed: dict[str, int]
    removed: dict[str, int]


class Pool:
    """A pool in a folder, as `write_pool` left it.

    Attributes:
        removed: the list of the rows that are not in it.
        parts: numbers of the rows of each source, in the order of their content.
        source_keys: of each row, (rows,) uint64.
        starts: where each row's tokens start in the file of tokens, and the last ends, (rows + 1,) int64. This and
            what follows is only there where the pool was written with an encoder.
        target_starts, target_bytes, source_cut, targets: of each row, see `tokenization`.
    """

    def __init__(self, folder: Path, keep: Any = None) -> None:
        contents = json.loads((folder / CONTENTS_FILE).read_text(encoding="utf-8"))

        def load(name: str) -> np.ndarray:
            return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))  # np.memmap itself is slow to index

        self.chosen = Chosen(
            held_out={name: [row_of(fields) for fields in rows] for name, rows in contents["held_out"].items()},
            train=SetReport(**contents["train"]),
            evaluation={name: SetReport(**counts) for name, counts in contents["evaluation"].items()},
            overlap_removed=contents["overlap_removed"],
            removed=contents["removed"],
        )
        self.removed = RemovedRows(folder / REMOVED_FILE, sum(self.chosen.removed.values()), keep)
        self.parts = {name: np.arange(first, last) for name, (first, last) in contents["parts"].items()}
        self.source_keys = load("source_keys")
        self._numbers, self._ends = load("numbers"), load("ends")
        self._rows = (folder / ROWS_FILE).open("rb")
        self._keep = keep  # a temporary folder lives as long as this
        if (folder / TOKENS_FILE).exists():
            self.starts, self.target_starts = load("starts"), load("target_starts")
            self.target_bytes, self.source_cut, self.targets = load("target_bytes"), load("source_cut"), load("targets")
            self.keys, self._families, self._family_names = load("keys"), load("families"), contents["families"]
            self._tokens = np.asarray(np.memmap(folder / TOKENS_FILE, dtype=np.int32, mode="r"))

    def row(self, number: int) -> Row:
        """Return a row in words."""
        return read_row(self._rows.fileno(), self._ends, int(self._numbers[number]))

    def tokens(self, number: int) -> Sequence[int]:
        """Return the tokens of a row's prompt and target."""
        return array("i", self._tokens[self.starts[number] : self.starts[number + 1]].tobytes())

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Return the tokens of each row."""
        return self.starts[numbers + 1] - self.starts[numbers]

    def flat_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Return the tokens of rows, one row after the other."""
        lengths = self.lengths(numbers)
        moved = self.starts[numbers] - (np.cumsum(lengths) - lengths)
        return self._tokens[np.arange(lengths.sum()) + np.repeat(moved, lengths)]

    def family(self, number: int) -> str | None:
        """Return a row's family."""
        return self._family_names[self._families[number]]


def write_pool(
    folder: Path, data: DataConfig, evaluation: EvaluationConfig, encoder: Encoder | None, folders: Folders
) -> None:
    """Read, hold out, filter and tokenize.

    Args:
        folder: is there and empty.
        encoder: makes rows into tokens; None leaves them in words, and lets data.filter.drop_truncated drop none.

    Raises:
        DataError: a source is missing, broken, empty or too small, or nothing is left.
    """
    rows = RowFile(folder / ROWS_FILE)
    sources: dict[str, SourceConfig] = {OWN_PART: data.source, **data.mix}
    train, ends = SetReport(), [0]
    evaluation_counts: dict[str, SetReport] = {}
    held_out: dict[str, list[Row]] = {}
    for name, source in sources.items():
        read_rows(source, rows, cache_dir=folders.cache_dir, data_dir=folders.data_dir, counts=train)
        ends.append(len(rows))
        if name == OWN_PART:  # before any other: a mix holds out what its own source alone holds out
            held_out = choose_held_out(source, evaluation, rows, folders, evaluation_counts)
    overlapping = overlap(rows.source_keys, held_out)
    overlap_removed = {
        name: len(numbers) - (len(held_out[name]) if name == HELD_OUT else 0) for name, numbers in overlapping.items()
    }
    left = np.ones(len(rows), dtype=bool)
    for numbers in overlapping.values():
        left[numbers] = False
    if not left.any():
        raise DataError(
            f"data set '{data.name}' has no row left to train on: all {len(rows)} ask what evaluation rows "
            "ask; try a smaller evaluation.rows"
        )
    keys = rows.keys
    candidates: list[int] = []
    for first, last in pairwise(ends):
        candidates += content_order(rows, np.flatnonzero(left[first:last]) + first, keys)
    others = texts_of_others(data, evaluation, folders, train)
    families: list[str | None] = []
    with (folder / REMOVED_FILE).open("w", encoding="utf-8") as listed:
        removed = Removed(listed)
        list_overlap(rows, overlapping, held_out, removed)
        kept = filter_rows(rows, candidates, data.filter, held_out, removed, others)
        if encoder is not None:
            kept, families = write_tokens(folder, rows, kept, encoder, removed if data.filter.drop_truncated else None)
    part_of_row = np.searchsorted(ends[1:], kept, side="right")  # parts follow each other
    bounds = np.searchsorted(part_of_row, np.arange(len(sources) + 1)).tolist()
    parts = {name: (bounds[index], bounds[index + 1]) for index, name in enumerate(sources)}
    for name, (first, last) in parts.items():
        if first == last:
            reasons = ", ".join(f"{count} removed: {reason}" for reason, count in removed.counts.items())
            raise DataError(f"data.filter leaves no row of part '{name}' of {data.name} ({reasons}); loosen it")
    np.save(folder / "numbers.npy", np.array(kept, dtype=np.int64))
    np.save(folder / "ends.npy", np.array(rows.ends, dtype=np.int64))
    np.save(folder / "keys.npy", keys[kept])
    np.save(folder / "source_keys.npy", rows.source_keys[kept])
    rows.close()
    contents = {
        "held_out": {name: [fields_of(row) for row in chosen] for name, chosen in held_out.items()},
        "train": asdict(train),
        "evaluation": {name: asdict(counts) for name, counts in evaluation_counts.items()},
        "overlap_removed": overlap_removed,
        "removed": removed.counts,
        "parts": parts,
        "families": families,
    }
    (folder / CONTENTS_FILE).write_text(json.dumps(contents), encoding="utf-8")


def compared_sets(data: DataConfig, evaluation: EvaluationConfig) -> dict[str, RowsConfig]:
    """Return what training rows are compared with besides the evaluation sets, by where it is configured."""
    if data.filter.contamination_words is None:
        return {}
    return {
        **{f"evaluation.benchmarks.{name}": rows for name, rows in evaluation.benchmarks.items()},
        **{f"data.filter.contamination_sets.{name}": rows for name, rows in data.filter.contamination_sets.items()},
    }


def texts_of_others(
    data: DataConfig, evaluation: EvaluationConfig, folders: Folders, counts: SetReport
) -> dict[str, Iterator[str]]:
    """Return what reads the texts of those sets once, by the last part of where each is configured.

    They are those of all columns of all rows: which rows of a benchmark are asked, its reader decides, and what may be
    trained on should not depend on it.
    """
    found: dict[str, list[Iterator[str]]] = {}
    for place, source in compared_sets(data, evaluation).items():
        found.setdefault(place.rpartition(".")[2], []).append(_texts_of(source, place, folders, counts))
    return {name: chain.from_iterable(texts) for name, texts in found.items()}


def _texts_of(source: RowsConfig, place: str, folders: Folders, counts: SetReport) -> Iterator[str]:
    broken = BrokenRows(origin_of(source, folders.data_dir, place))
    for record in read_records(source, broken, folders.cache_dir, folders.data_dir, counts.revisions, place):
        yield from texts_in(record.columns)
    broken.raise_if_any()


def write_tokens(
    folder: Path, rows: RowFile, chosen: Sequence[int], encoder: Encoder, removed: Removed | None
) -> tuple[list[int], list[str | None]]:
    """Write rows in tokens, and what became of each.

    Args:
        chosen: the numbers of the rows.
        removed: gets those over a token limit, which are then not written; None: all are, cut.

    Returns:
        The numbers of the rows that are written, and the names of their families.
    """
    kept: list[int] = []
    starts, lengths, target_bytes = array("q", [0]), array("i"), array("i")
    source_cut, targets, families = array("b"), array("b"), array("i")
    names: dict[str | None, int] = {}
    with (folder / TOKENS_FILE).open("wb") as file:
        for first in range(0, len(chosen), ROWS_AT_ONCE):
            numbers = chosen[first : first + ROWS_AT_ONCE]
            chunk = [rows[number] for number in numbers]
            for number, row, found in zip(numbers, chunk, encoder(chunk), strict=True):
                if removed is not None and (found.source_cut or found.target in (CUT, CUT_AWAY)):
                    removed.add(row, TRUNCATED, "source" if found.source_cut else "target")
                    continue
                kept.append(number)
                ids = array("i", [*found.prompt_ids, *found.target_ids])
                file.write(ids.tobytes())
                starts.append(starts[-1] + len(ids))
                lengths.append(len(found.prompt_ids))
                target_bytes.append(found.target_bytes)
                source_cut.append(found.source_cut)
                targets.append(found.target)
                families.append(names.setdefault(row.family, len(names)))
    columns = {
        "starts": (starts, np.int64),
        "target_starts": (lengths, np.int32),
        "target_bytes": (target_bytes, np.int32),
        "source_cut": (source_cut, np.bool_),
        "targets": (targets, np.uint8),
        "families": (families, np.int32),
    }
    for name, (values, kind) in columns.items():
        np.save(folder / f"{name}.npy", np.array(values, dtype=kind))
    return kept, list(names)


def choose_held_out(
    own_source: SourceConfig,
    evaluation: EvaluationConfig,
    own_rows: Sequence[Row] | None,
    folders: Folders,
    counts: dict[str, SetReport],
) -> dict[str, list[Row]]:
    """Choose the rows of every evaluation set; of the run's own source where none is configured.

    Args:
        own_rows: of the run's own source; None where it has no end.
        counts: gets what was read for each set.
    """
    if not evaluation.sets:
        counts[HELD_OUT] = SetReport()
        return {HELD_OUT: evaluation_rows(own_source, own_rows, evaluation, HELD_OUT)}
    held_out: dict[str, list[Row]] = {}
    for name, source in evaluation.sets.items():
        counts[name] = SetReport()
        pool = None
        if source.kind != "procedural":
            pool = load_rows(source, cache_dir=folders.cache_dir, data_dir=folders.data_dir, counts=counts[name])
        held_out[name] = evaluation_rows(source, pool, evaluation, name)
    return held_out


def evaluation_rows(
    source: SourceConfig, pool: Sequence[Row] | None, evaluation: EvaluationConfig, name: str
) -> list[Row]:
    if pool is not None:
        return choose_evaluation_rows(pool, evaluation.rows, evaluation.seed, name)
    return procedural_rows(
        evaluation.rows, seed=evaluation.seed, role="evaluation", families=source.families, distinct=True
    )
