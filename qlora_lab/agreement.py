"""How far judges agree: python -m qlora_lab.agreement FILE_OR_FOLDER... [--answers ... --report FILE.html]

Every judge against every other, with people as one (the majority of their votes), people among themselves, and each
judge who saw pairs in both orders against itself: verdict by verdict, and by the ranking of systems. The report shows
the largest disagreements of two of them, by category and by question.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.command import add_sources, is_person, judges_of, load_sources, run
from qlora_lab.ratings.comparison import (
    ItemAgreement,
    RankAgreement,
    both_orders,
    compare_group,
    compare_rankings,
    compare_two,
    verdicts,
    verdicts_as_shown,
)
from qlora_lab.ratings.judgments import HUMAN, Judgment, RatingsWarning, majority
from qlora_lab.runs.files import to_json

MOST_PEOPLE = 6  # who are also compared two by two


@dataclass(frozen=True)
class Comparison:
    """Two raters, or a group of them where `other` is None; a part is None where they share nothing to compare.

    `as_shown` compares verdicts on pairs shown in the same order, `items` those on pairs in whichever order. A judge
    has no ranking of one order alone: being shown first could not be told from being better.
    """

    one: str
    other: str | None
    items: ItemAgreement | None
    as_shown: ItemAgreement | None = None
    rankings: RankAgreement | None = None


def comparisons(judgments: Sequence[Judgment], *, draws: int, seed: int) -> list[Comparison]:
    """Compare all judges, see the module's docstring."""
    by_judge = {name: _of(judgments, name) for name in judges_of(judgments)}
    people = {name: _of(judgments, name) for name in sorted({its.judge for its in judgments if is_person(its.judge)})}
    compared = [
        _two(one, other, by_judge[one], by_judge[other], draws=draws, seed=seed)
        for one, other in combinations(by_judge, 2)
    ]
    if len(people) > 1:
        group = compare_group(by_judge[HUMAN], draws=draws, seed=seed)
        compared.append(Comparison("people among themselves", None, group))
        if len(people) <= MOST_PEOPLE:
            compared += [
                _two(one, other, people[one], people[other], draws=draws, seed=seed)
                for one, other in combinations(people, 2)
            ]
    for name, its in by_judge.items():
        straight, swapped = both_orders(its)
        if name != HUMAN and straight and swapped:
            items = compare_two(verdicts(straight), verdicts(swapped), draws=draws, seed=seed)
            compared.append(Comparison(name, f"{name}, order swapped", items))
    return compared


def _of(judgments: Sequence[Judgment], judge: str) -> list[Judgment]:
    return [its for its in judgments if its.judge == judge or (judge == HUMAN and is_person(its.judge))]


def _two(
    one: str, other: str, its: Sequence[Judgment], others: Sequence[Judgment], *, draws: int, seed: int
) -> Comparison:
    return Comparison(
        one,
        other,
        compare_two(verdicts(its), verdicts(others), draws=draws, seed=seed),
        compare_two(verdicts_as_shown(its), verdicts_as_shown(others), draws=draws, seed=seed),
        _rankings(one, other, its, others, draws=draws, seed=seed),
    )


def _rankings(
    one: str, other: str, its: Sequence[Judgment], others: Sequence[Judgment], *, draws: int, seed: int
) -> RankAgreement | None:
    sides = [majority(side) if any(is_person(vote.judge) for vote in side) else side for side in (its, others)]
    try:
        return compare_rankings(sides[0], sides[1], draws=draws, seed=seed)
    except DataError as error:
        warnings.warn(f"rankings of {one} and {other} are not compared: {error}", RatingsWarning, stacklevel=2)
        return None


def agreement_table(compared: Sequence[Comparison]) -> str:
    """Lay out comparisons for a terminal; every number with its 95 % interval over questions and what it is of."""
    lines = []
    for its in compared:
        lines.append(its.one if its.other is None else f"{its.one} and {its.other}")
        for what, items in (("pairs", its.items), ("pairs shown in the same order", its.as_shown)):
            if items is not None:
                lines.append(f"  {items.items} {what}, {items.questions} questions: same verdict {_share(items.same)}")
                lines += [f"    {name:28} {_told(value)}{of}" for name, value, of in _measures(items)]
        if its.items is None:
            lines.append("  nothing that both judged")
        if its.rankings is not None:
            lines.append(f"  ranking of {its.rankings.systems} systems, {its.rankings.questions} questions")
            lines.append(f"    {'Kendall tau':28} {_told(its.rankings.kendall_tau)}")
            lines.append(f"    {'Spearman rho':28} {_told(its.rankings.spearman_rho)}")
        lines.append("")
    return "\n".join([*lines, "in brackets: 95 % intervals over questions"])


def _measures(items: ItemAgreement) -> list[tuple[str, tuple[float, float, float], str]]:
    fleiss_of = f", of {items.fleiss_items} pairs with {items.raters} votes" if items.cohen is None else ""
    return [
        *([("Cohen kappa", items.cohen, "")] if items.cohen is not None else []),
        ("Fleiss kappa", items.fleiss, fleiss_of),
        ("Krippendorff alpha, nominal", items.alpha_nominal, ""),
        ("Krippendorff alpha, ordinal", items.alpha_ordinal, ""),
    ]


def _told(value: tuple[float, float, float]) -> str:
    return "none: one class only" if math.isnan(value[0]) else "{:.3f} ({:.3f} to {:.3f})".format(*value)


def _share(value: tuple[float, float, float]) -> str:
    return "{:.1%} ({:.1%} to {:.1%})".format(*value)


def two_raters(judgments: Sequence[Judgment], asked: Sequence[str]) -> list[tuple[str, list[Judgment]]]:
    """Return the names and judgments of the two whose disagreements are shown: those asked for, else the only two.

    One judge alone is compared with itself: the order shown and the order swapped.

    Raises:
        DataError: a name is none of the judges, or it is not clear which two.
    """
    judges = judges_of(judgments)
    people = sorted({its.judge for its in judgments if is_person(its.judge)})
    for name in asked:
        if name not in (*judges, *people):
            raise DataError(unknown_name("--judges", name, [*judges, *people]))
    names = list(asked) or judges
    if len(names) == 1:
        straight, swapped = both_orders(_of(judgments, names[0]))
        return [(names[0], straight), (f"{names[0]}, order swapped", swapped)]
    if len(names) != 2:
        raise DataError(f"the report is about two judges; choose with --judges from {', '.join([*judges, *people])}")
    return [(name, _of(judgments, name)) for name in names]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.agreement", description="Tell how far judges agree.")
    add_sources(parser)
    parser.add_argument("--judges", nargs="+", default=[], metavar="NAME", help="the two whose disagreements to show")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="where to write disagreements and answers")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    run(lambda: _told_by(options))


def _told_by(options: argparse.Namespace) -> str:
    found, known = load_sources(options)
    if not found.judgments:
        raise DataError("agreement needs verdicts; the files hold none")
    compared = comparisons(found.judgments, draws=options.draws, seed=options.seed)
    if not compared:
        raise DataError("there is one judge, who saw each pair in one order: nothing to compare")
    said = to_json([asdict(its) for its in compared], indent=1) if options.json else agreement_table(compared)
    if options.report is not None:
        from analysis.report.disagreements import write_report  # the look of a page: only where one is asked for

        write_report(options.report, two_raters(found.judgments, options.judges), known, agreement_table(compared))
        said += "" if options.json else f"\n\n{options.report}"
    return said


if __name__ == "__main__":
    main()
