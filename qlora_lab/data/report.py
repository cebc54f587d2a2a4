"""What became of every row: read, dropped, held out, truncated, swapped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class SetReport:
    """The counts of one set of rows, for training or for evaluation."""

    rows_read: int = 0  # records of the source
    rows_without_pair: dict[str, int] = field(default_factory=dict)  # by reason
    pairs: int = 0  # made of the records
    empty_targets: int = 0  # pairs dropped
    rows: int = 0  # examples in the end
    sources_truncated: int = 0
    targets_truncated: int = 0
    targets_truncated_away: int = 0  # rows dropped: nothing but white space was left of the target
    tokens: int = 0
    target_tokens: int = 0  # eos among them
    longest_row_tokens: int = 0
    revisions: dict[str, str] = field(default_factory=dict)  # the commit of each hub set that was read

    def count_without_pair(self, reason: str) -> None:
        self.rows_without_pair[reason] = self.rows_without_pair.get(reason, 0) + 1


@dataclass
class DataReport:
    """The counts of a run's data: its training rows, each evaluation set, and what was done between them."""

    train: SetReport = field(default_factory=SetReport)
    held_out: dict[str, SetReport] = field(default_factory=dict)
    overlap_removed: dict[str, int] = field(default_factory=dict)  # training rows, by the set they overlap
    filtered: dict[str, int] = field(default_factory=dict)  # rows of the sources that were removed, by reason
    parts: dict[str, int] = field(default_factory=dict)  # of a mix: training rows by their source
    wrong_answers: int = 0
    wrong_answers_impossible: int = 0  # wanted, but their family has only one answer

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain dictionaries and numbers."""
        return asdict(self)

    def summary(self) -> str:
        """Return the counts in one line, leaving out what did not happen."""
        train = self.train
        parts = [f"{train.rows:,} training rows ({train.tokens:,} tokens, {train.target_tokens:,} of targets)"]
        parts += [f"{counts.rows:,} rows held out as {name}" for name, counts in self.held_out.items()]
        parts += [f"{count:,} of them from {name}" for name, count in self.parts.items()]
        parts += worded(
            {
                **{f"rows filtered out ({reason})": count for reason, count in self.filtered.items()},
                "wrong answers put in": self.wrong_answers,
                "wrong answers that could not be had": self.wrong_answers_impossible,
                "training rows removed for overlap": sum(self.overlap_removed.values()),
            }
        )
        sentences = [", ".join(parts), *dropped_and_truncated("training", [train])]
        sentences += dropped_and_truncated("evaluation", list(self.held_out.values()))
        return "data: " + "; ".join(sentences)


def dropped_and_truncated(stage: str, sets: Sequence[SetReport]) -> list[str]:
    """Word the drops and truncations of several sets together; nothing where there were none."""
    happened = Counter[str]()
    for counts in sets:
        happened.update({f"rows with {reason}": count for reason, count in counts.rows_without_pair.items()})
        happened["rows with an empty target"] += counts.empty_targets
        happened["targets truncated away"] += counts.targets_truncated_away
        happened["sources truncated"] += counts.sources_truncated
        happened["targets truncated"] += counts.targets_truncated
    parts = worded(happened)
    return [f"{stage}: {', '.join(parts)}"] if parts else []


def worded(happened: Mapping[str, int]) -> list[str]:
    return [f"{count:,} {what}" for what, count in happened.items() if count]
