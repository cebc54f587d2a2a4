"""What a model is given of a data set: a few rows with the tokens that are scored marked, and counts of all."""

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from qlora_lab.config import hardware
from qlora_lab.config.command import command
from qlora_lab.config.load import from_hydra
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import CLASSIFICATION, DataConfig, RunConfig
from qlora_lab.data.prepare import PreparedData, data_of_run
from qlora_lab.data.report import DataReport
from qlora_lab.data.tokenization import Example
from qlora_lab.models.load import load_tokenizer
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.wheels import default_cache_dir

ROWS = 3
REMOVED_ROWS = 3
TERMINAL_MARKS = "\x1b[30;42m", "\x1b[0m"  # black on green
PLAIN_MARKS = "[[", "]]"


def preview(node: DictConfig) -> None:
    """Print the first rows a run would draw, as its model will see them."""
    composed = from_hydra(node)
    data_dir = Path(composed.paths.data_dir)
    config = resolve(composed, hardware.detect(), lambda source: source_fingerprint(source, data_dir))
    cache_dir = Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()
    tokenizer = load_tokenizer(config.model, cache_dir)
    data = data_of_run(config, tokenizer, cache_dir)
    show(config, data, tokenizer, sys.stdout)


def show(config: RunConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase, stream: TextIO) -> None:
    """Write the preview of a run's data, with colours where `stream` is a terminal."""
    marks = TERMINAL_MARKS if stream.isatty() else PLAIN_MARKS
    for number, example in enumerate(data.train[:ROWS], start=1):
        scored = example.length - example.loss_start
        family = f", family {example.family}" if example.family else ""
        stream.write(f"--- row {number} of {len(data.train):,}: {example.length} tokens, {scored} scored{family}\n")
        stream.write(marked_text(example, tokenizer, config.data.labels, marks) + "\n\n")
    stream.write("\n".join(counts(config.data, data.report, data.train_lengths)) + "\n")
    if data.removed is not None:
        stream.write(f"the first removed rows of {len(data.removed):,} (a run lists all in data/removed.jsonl):\n")
        for row in islice(data.removed, REMOVED_ROWS):
            stream.write(f"  {row['reason']} ({row['because']}): {row['row']!r}\n")


def marked_text(
    example: Example, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], marks: tuple[str, str]
) -> str:
    """Return a row's tokens as text, its scored ones between `marks`; control tokens show by their names."""
    before, scored = example.input_ids[: example.loss_start], example.input_ids[example.loss_start :]
    if example.task == CLASSIFICATION:
        shown = f"class {scored[0]}: {labels[scored[0]]}"
    else:
        shown = decoded(scored, tokenizer)
    return f"{decoded(before, tokenizer)}{marks[0]}{shown}{marks[1]}"


def decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def counts(data: DataConfig, report: DataReport, lengths: Sequence[int]) -> list[str]:
    """Return the counts of a run's data, a line each."""
    train = report.train
    middle = sorted(lengths)[len(lengths) // 2]
    numbers = {
        "records read": train.rows_read,
        "(source, target) pairs": train.pairs,
        "training rows": train.rows,
        "tokens": train.tokens,
        "tokens scored": train.target_tokens if data.loss_on == "target" else train.tokens - train.rows,
        "tokens of the median row": middle,
        "tokens of the longest row": train.longest_row_tokens,
        "sources truncated": train.sources_truncated,
        "targets truncated": train.targets_truncated,
        "rows without a target": train.empty_targets + train.targets_truncated_away,
        "wrong answers put in": report.wrong_answers,
        **{f"records dropped: {reason}": count for reason, count in train.rows_without_pair.items()},
        **{f"rows from {name}": count for name, count in report.parts.items()},
        **{f"rows removed: ask what set '{name}' asks": count for name, count in report.overlap_removed.items()},
        **{f"rows removed: {reason}": count for reason, count in report.filtered.items()},
        **{f"rows held out as {name}": found.rows for name, found in report.held_out.items()},
    }
    return [f"{name:44}{count:>12,}" for name, count in numbers.items() if count]


def main(words: list[str]) -> None:
    sys.argv[1:] = words  # where Hydra looks
    command("train", preview)
