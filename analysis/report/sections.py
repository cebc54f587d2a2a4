"""The sections of a report, each as HTML; an empty text where an answer has nothing for one."""

import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from analysis.report.contents import counted_line, fixed_table, not_counted_table, varied_table
from analysis.report.figures.answers import MOST_ARM_LINES, arm_figure, row_difference_figure
from analysis.report.figures.style import to_svg
from analysis.report.page import bullet_list, details, figure, paragraph, section, table
from analysis.report.samples import Sample
from analysis.report.tables import arm_table, comparison_table, to_html
from analysis.report.terminal import metric_line, remarks, seed_text
from analysis.statistics.blocks import FALSE_POSITIVES_IN_BLOCKS, OWN_BLOCKS
from analysis.statistics.rows import DRAWS
from analysis.statistics.verdicts import FALSE_POSITIVES, FEW_SEEDS
from analysis.study.answer import Answer
from analysis.study.metrics import describe, format_value
from analysis.study.plan import StudyPlan
from analysis.study.wording import following

MOST_PAIRS_DRAWN, MOST_PAIRS_SHOWN = 3, 20
MOST_PAIRS_LISTED = 200
MOST_TRACEBACKS = 20
MANY_ROWS = 8  # of a table that can be sorted and filtered
MOST_CHARACTERS = 600  # of a prompt or a generation


def header(answer: Answer, plan: StudyPlan) -> str:
    return (
        paragraph(f"Study {plan.name}", "study")
        + f"<h1>{escape(plan.question or plan.name)}</h1>\n"
        + paragraph(answer.sentence, "answer")
        + bullet_list(answer.findings)
        + "".join(paragraph(remark) for remark in remarks(plan))
        + paragraph(counted_line(answer), "soft failed" if len(answer.not_counted) else "soft")
        + bullet_list(answer.notes, "notes")
    )


def arms(answer: Answer) -> str:
    content = [to_html(arm_table(answer)), paragraph(metric_line(answer), "soft")]
    if answer.table["n"].any():
        caption = (
            "Mean of each arm, every seed as a dot, and the 95 % interval over seeds and held-out rows. Arms are "
            "compared on the same rows, so arms whose bands overlap may still be separated: the comparisons decide."
        )
        if len(answer.arms) > MOST_ARM_LINES:
            caption += f" The best {MOST_ARM_LINES} of {len(answer.arms)} arms are drawn."
        content.append(figure(to_svg(arm_figure(answer), f"{answer.metric} of each arm"), caption))
    return section("Arms", *content)


def comparisons(answer: Answer) -> str:
    if not answer.comparisons:
        return ""
    metric = describe(answer.metric)
    unit = f" ({metric.difference_unit})" if metric.difference_unit else ""
    of_the_best = [pair for pair in answer.comparisons if pair.first == answer.arms[0]]
    shown = of_the_best[:MOST_PAIRS_SHOWN]
    others = [pair for pair in answer.comparisons if pair not in shown]
    content = [
        to_html(comparison_table(answer, shown), text_columns=["verdict"]),
        paragraph(f"First arm minus second in {answer.metric}{unit}, on the seeds and rows that both have.", "soft"),
    ]
    if others:
        hidden = to_html(comparison_table(answer, others[:MOST_PAIRS_LISTED]), text_columns=["verdict"])
        first = f", the first {MOST_PAIRS_LISTED} of them" if len(others) > MOST_PAIRS_LISTED else ""
        content.append(details(f"The other {len(others):,} pairs{first}", hidden))
    comparable = [pair for pair in of_the_best if pair.refused is None]
    drawn = row_difference_figure(answer, comparable[:MOST_PAIRS_DRAWN])
    if drawn is not None:
        caption = (
            f"{answer.metric} of the first arm minus the second on each held-out row, mean over seeds. The dashed line "
            "is the difference over all rows, as the metric weighs them."
        )
        content.append(figure(to_svg(drawn, "Differences row by row"), caption))
    return section("Comparisons", *content)


def samples(chosen: Sequence[Sample], n_arms: int) -> str:
    if not chosen:
        return ""
    shown = len(chosen[0].written)
    whose = "every arm" if shown == n_arms else f"all of these {shown} arms (of {n_arms}, the best with answers)"
    intro = f"The first held-out rows that {whose} answered, one of each kind first; not chosen by result."
    return section("What the arms wrote", paragraph(intro, "soft"), *(_sample(sample) for sample in chosen))


def _sample(sample: Sample) -> str:
    lines = [f"<dt>expected</dt><dd>{_shown(sample.target)}</dd>"]
    for written in sample.written:
        mark = {True: ' <span class="right">right</span>', False: ' <span class="wrong">wrong</span>', None: ""}
        cut = ' <span class="soft">(stopped at the length limit)</span>' if written.stopped_by_length else ""
        lines.append(f"<dt>{escape(written.arm)}</dt><dd>{_shown(written.text)}{mark[written.exact_match]}{cut}</dd>")
    return f'<div class="sample"><div class="prompt">{_shown(sample.prompt)}</div><dl>\n{"".join(lines)}</dl></div>\n'


def _shown(text: str) -> str:
    text = text.strip()
    if not text:
        return '<span class="soft">(nothing)</span>'
    return escape(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … (shortened)")


def failures(answer: Answer) -> str:
    """List the runs that are in no mean, each with what became of it, and their tracebacks."""
    records = answer.not_counted.to_dict("records")
    told = not_counted_table(answer)
    rows = [
        [f"<code>{escape(run)}</code>", escape(arm), seed, f'<span class="failed">{escape(happened)}</span>']
        for run, arm, seed, happened in told.itertuples(index=False, name=None)
    ]
    traced = [run for run in records if isinstance(run["traceback"], str)]
    tracebacks = [
        details(f"Traceback of {run['run_id']}", f"<pre>{escape(run['traceback'])}</pre>\n")
        for run in traced[:MOST_TRACEBACKS]
    ]
    if len(traced) > MOST_TRACEBACKS:
        tracebacks.append(paragraph(f"The other {len(traced) - MOST_TRACEBACKS:,} are in their status.json.", "soft"))
    listed = table(list(told.columns), rows, {"run", "arm", "what happened"}, _kind(rows)) if rows else ""
    return section("Runs that are not counted", listed, *tracebacks)


def runs(answer: Answer, folder: Path) -> str:
    """List every run, with a link relative to `folder` and its value."""
    not_counted = set(answer.not_counted["run_id"])
    order = answer.runs["arm"].map({arm: number for number, arm in enumerate(answer.arms)})
    records = answer.runs.assign(order=order).sort_values(["order", "seed"]).to_dict("records")
    rows = [_run_cells(answer, run, folder, counted=run["run_id"] not in not_counted) for run in records]
    columns = ["run", "arm", "seed", answer.metric, "state"]
    return section("Runs", table(columns, rows, {"run", "arm", "state"}, _kind(rows)))


def _kind(rows: Sequence[object]) -> str:
    return "many" if len(rows) >= MANY_ROWS else ""


def _run_cells(answer: Answer, run: Mapping[Hashable, Any], folder: Path, *, counted: bool) -> list[str]:
    run_folder = Path(str(run["folder"]))
    name = f"<code>{escape(str(run['run_id']))}</code>"
    if run_folder.is_dir():
        link = quote(os.path.relpath(run_folder, folder).replace(os.sep, "/"))
        name = f'<a href="{link}/">{name}</a>'
    value = format_value(describe(answer.metric), float(run[answer.metric])) if counted else "–"
    state = "finished" if counted else f'<span class="failed">{escape(str(run["state"]).replace("_", " "))}</span>'
    return [name, escape(str(run["arm"])), seed_text(run["seed"]), value, state]


def design(answer: Answer, plan: StudyPlan) -> str:
    varied, fixed = varied_table(answer, plan), fixed_table(plan)
    content = [to_html(varied, text_columns=["values"])] if len(varied) else []
    if len(fixed):
        content.append(details(f"Held fixed: {len(fixed)} settings", to_html(fixed, text_columns=["value"])))
    return section("Varied and held fixed", *content)


def method(answer: Answer) -> str:
    pairs = answer.comparisons[0].n_comparisons if answer.comparisons else 0
    sign = f"every shared seed's difference has the same sign (where they are fewer than {FEW_SEEDS})"
    corrected = (
        f"{sign}, and the difference survives Holm's correction for {pairs:,} comparisons (those that two or more "
        "seeds allow) at 5 %."
        if pairs > 1
        else f"and {sign}."
    )
    by_seeds = [
        "Two arms are called separated only if at least two seeds are shared, the interval excludes 0, " + corrected,
        FALSE_POSITIVES,
    ]
    survives = f" and survives Holm's correction for {pairs:,} comparisons at 5 %." if pairs > 1 else "."
    by_rows = (
        "Nothing was trained or drawn, so that one seed says all there is to say. Two arms are called separated if the "
        f"interval, which is over the held-out rows, excludes 0{survives}"
    )
    text = (
        "An arm is a configuration without its seed. Its row in the table is the mean over its finished runs; runs "
        "that did not finish are listed, never counted.",
        "Two arms are compared on the seeds and the held-out rows that both have. The difference is that of the "
        "reported metric (for a loss: nats summed over all target tokens, over the number of these tokens). Its 95 % "
        f"interval adds two variances: that of the rows (bootstrap, {DRAWS:,} resamples, the same rows for all seeds "
        "and both arms) and that of the seeds. The second is estimated from all arms together, from what is left of "
        "each run's metric without the mean of its arm and of its seed, and is at least that of the two arms' own "
        "differences. The interval is widened by Student's t with Satterthwaite's degrees of freedom, because few "
        "seeds say little about their own spread. With one seed it covers the rows only.",
        *(by_seeds if answer.scores.seeded else [by_rows]),
    )
    changes = "; ".join(following(compared.axis) for compared in answer.by_axis if compared.axis.follow)
    by_axis = (
        "The values of one axis are compared in blocks: runs that have all other settings and the seed in common"
        f"{f' (but {changes})' if changes else ''}. The difference is the mean over the blocks that both values have; "
        "what a block has of its own drops out of it. "
        "The spread of the blocks' differences takes the place of the seeds' (with fewer than "
        f"{OWN_BLOCKS} blocks at least that pooled over all values of the axis). With two seeds or more it is at least "
        "the spread between seeds of the mean over settings, because runs of one seed draw the same training rows in "
        "all settings; effect sizes, and what would tell a pair apart, are then of seeds instead of blocks. Holm's "
        "correction counts the pairs of the axis. It is a statement on the settings that were tried, not on others."
    )
    text = (
        *text,
        *([by_axis, *([FALSE_POSITIVES_IN_BLOCKS] if answer.scores.seeded else [])] if answer.by_axis else []),
    )
    return section("How this was computed", *(paragraph(part) for part in text))


def footer(answer: Answer, plan: StudyPlan) -> str:
    lines = [escape(line) for line in environment_lines(answer.runs)]
    if plan.command:
        lines.append(f"Command: <code>{escape(plan.command)}</code>")
    if plan.created_at:
        lines.append(escape(f"Planned: {plan.created_at}"))
    return f"<footer>\n{'<br>'.join(lines)}\n</footer>\n"


def environment_lines(runs: pd.DataFrame) -> list[str]:
    """Return one line for each kind of environment that the finished runs report."""
    counts = Counter(_environment_of(run) for run in runs[runs["state"] == "finished"].to_dict("records"))
    many = len(counts) > 1
    return [f"Environment{f' of {count} runs' if many else ''}: {line}" for line, count in counts.items()]


def _environment_of(run: Mapping[Hashable, Any]) -> str:
    def value(key: str) -> str | None:
        found = run.get(f"environment.{key}")
        return None if pd.isna(found) else f"{found:.0f}" if isinstance(found, float) else str(found)

    commit, _, changes = (value("git_commit") or "").partition("+")
    parts = [
        (value("device"), "{}"),
        (value("cpu"), "{}"),
        (value("threads"), "{} threads"),
        (value("compute_dtype"), "{}"),
        (value("kernels"), "kernels: {}"),
        (value("packages.torch"), "torch {}"),
        (value("packages.transformers"), "transformers {}"),
        (commit[:12], "commit {} with changes" if changes else "commit {}"),
    ]
    return ", ".join(text.format(found) for found, text in parts if found) or "not recorded"
