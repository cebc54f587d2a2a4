"""The answer as a block of text for a terminal."""

import textwrap
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from analysis.report.tables import WIDTH, arm_table, axis_table, to_text
from analysis.study.answer import Answer
from analysis.study.axes import AxisComparison
from analysis.study.metrics import describe
from analysis.study.plan import StudyPlan
from analysis.study.wording import block_words
from qlora_lab.sweep.listing import listed

MOST_ARMS = 50  # in the table; the report has all
MOST_PAIRS = 10
IN_THE_TERMINAL = ["values", "verdict", "difference", "95 % interval", "blocks", "p (Holm)"]
MOST_CHARACTERS = 300  # of an error; the whole one is in the run's status.json


def answer_text(answer: Answer, plan: StudyPlan) -> str:
    """Return the answer for a terminal: the table, the sentence, what is not counted, the files."""
    blocks = [
        _wrapped(f"{plan.name}: {plan.question}" if plan.question else plan.name),
        _shown_arms(answer) + "\n" + _wrapped(metric_line(answer)),
        "\n".join([_wrapped(answer.sentence), *(_wrapped(f"- {text}", "  ") for text in answer.findings)]),
        *_axis_block(answer),
        *(_wrapped(remark) for remark in remarks(plan)),
    ]
    if len(answer.not_counted):
        lines = [f"- {line}" for line in listed(_not_counted_lines(answer))]
        blocks.append("\n".join(["Runs that are not in the table's means:", *(_wrapped(line, "  ") for line in lines)]))
    if answer.notes:
        blocks.append("\n".join(_wrapped(f"- {note}", "  ") for note in answer.notes))
    blocks.append("\n".join(f"{name}: {path}" for name, path in answer.paths.items()))
    return "\n\n".join(blocks)


def remarks(plan: StudyPlan) -> list[str]:
    """Return what the answer must be read with."""
    found = f"The original study found: {plan.paper_found}" if plan.paper_found else None
    return [remark for remark in (found, plan.caution) if remark]


def _shown_arms(answer: Answer) -> str:
    table = arm_table(answer)
    more = len(table) - MOST_ARMS
    return to_text(table.head(MOST_ARMS)) + (f"\n(and {more:,} arms more, in the report)" if more > 0 else "")


def _axis_block(answer: Answer) -> list[str]:
    """Return the pairs of the best value of the axis that answers the question, as far as one does."""
    if answer.answering is None:
        return []
    pairs = answer.answering.of_the_best
    shown = axis_table(answer, pairs[:MOST_PAIRS])[IN_THE_TERMINAL]
    more = f"\n(and {len(pairs) - MOST_PAIRS:,} more, in the report)" if len(pairs) > MOST_PAIRS else ""
    return [f"{_wrapped(block_line(answer, answer.answering))}\n\n{to_text(shown)}{more}"]


def block_line(answer: Answer, compared: AxisComparison) -> str:
    """Say what the numbers of an axis are, and what a block is."""
    axis, unit = compared.axis, describe(answer.metric).difference_unit
    return (
        f"Values of {axis.name}, first minus second in {answer.metric}{f' ({unit})' if unit else ''}, over the blocks "
        f"that both have: runs of one block have the same {block_words(axis)}."
    )


def metric_line(answer: Answer) -> str:
    """Say what the table's numbers are."""
    unit = describe(answer.metric).unit
    better = "lower" if answer.goal == "min" else "higher"
    return (
        f"{answer.metric}{f' in {unit}' if unit else ''}, {better} is better: mean over seeds, and its 95 % interval "
        "over seeds and held-out rows."
    )


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _not_counted_lines(answer: Answer) -> list[str]:
    return [
        f"{run['run_id']} ({run['arm']}, seed {seed_text(run['seed'])}): {what_happened(answer, run)}"
        for run in answer.not_counted.to_dict("records")
    ]


def what_happened(answer: Answer, run: Mapping[Hashable, Any]) -> str:
    """Say why a run of `answer.not_counted` is not counted."""
    state = str(run["state"]).replace("_", " ")
    if state == "finished":
        return f"finished without a finite {answer.metric}"
    if state == "running":
        return "still running, or its process died without a word"
    return state if pd.isna(run["reason"]) else f"{state}: {textwrap.shorten(str(run['reason']), MOST_CHARACTERS)}"


def seed_text(seed: Any) -> str:
    return "unknown" if pd.isna(seed) else str(seed)
