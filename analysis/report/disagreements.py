"""Where two judges differ, as one HTML page: by category, the largest first, and every question with its answers.

Everything that a model, a judge or a person wrote is escaped; the page asks nothing of the network.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote

from analysis.report.page import details, page, paragraph, section, table
from qlora_lab.ratings.answers import Question, by_question
from qlora_lab.ratings.disagreements import Case, by_number, cases
from qlora_lab.ratings.files import AnswerFiles
from qlora_lab.ratings.judgments import Judgment
from qlora_lab.runs.files import write_atomic

LARGEST, LARGEST_OF_A_CATEGORY = 40, 10  # disagreements that are listed; every question shows all of its own
LONGEST_ASKED = 90  # characters of a question in a list
NO_CATEGORY = "no category"


def write_report(
    file: Path, raters: Sequence[tuple[str, Sequence[Judgment]]], known: AnswerFiles, agreement: str
) -> None:
    """Write the page about two raters, given by name with what they judged.

    Args:
        known: answers and questions to show; what is not among them is told by its id alone.
        agreement: the table of agreement, as text.
    """
    (one, its), (other, others) = raters
    found = cases(its, others)
    title = f"Where {one} and {other} differ"
    opposite = sum(case.opposite for case in found)
    body = [
        f"<h1>{escape(title)}</h1>\n",
        paragraph(
            f"{len(found)} pairs of answers to {len({case.question for case in found})} questions were judged by both. "
            f"On {opposite} they prefer different answers."
        ),
        details("Agreement, with intervals", f"<pre>{escape(agreement)}</pre>\n"),
        section("By category", _categories(found, known.questions), _of_categories(found, known.questions, one, other)),
        section("Largest disagreements", _largest(found, known.questions, one, other)),
        section("Questions", _index(found, known.questions), _questions(found, known, one, other)),
    ]
    write_atomic(file, page(title, "".join(body)))


def _categories(found: Sequence[Case], questions: Mapping[str, Question]) -> str:
    rows = []
    for category in sorted({_category(case, questions) for case in found}):
        its = [case for case in found if _category(case, questions) == category]
        rows.append(
            [
                escape(category),
                str(len({case.question for case in its})),
                str(len(its)),
                f"{sum(case.gap == 0 for case in its) / len(its):.0%}",
                f"{sum(case.opposite for case in its) / len(its):.0%}",
                f"{sum(case.gap for case in its) / len(its):.2f}",
            ]
        )
    columns = ["category", "questions", "pairs", "same", "opposite", "mean difference"]
    return table(columns, rows, left=["category"])


def _of_categories(found: Sequence[Case], questions: Mapping[str, Question], one: str, other: str) -> str:
    return "".join(
        details(f"{category}: the largest", _largest(its, questions, one, other, most=LARGEST_OF_A_CATEGORY))
        for category in sorted({_category(case, questions) for case in found})
        if (its := [case for case in found if _category(case, questions) == category])[0].gap > 0
    )


def _largest(
    found: Sequence[Case], questions: Mapping[str, Question], one: str, other: str, most: int = LARGEST
) -> str:
    rows = [
        [
            _link(case.question),
            escape(_category(case, questions)),
            escape(shorten(_asked(case.question, questions), LONGEST_ASKED, placeholder=" ...")),
            *_verdicts(case),
        ]
        for case in found[:most]
        if case.gap > 0
    ]
    columns = ["question", "category", "asked", "answers of", one, other]
    differing = sum(case.gap > 0 for case in found)
    more = paragraph(f"{len(rows)} of {differing}.", "soft") if differing > len(rows) else ""
    return table(columns, rows, left=columns) + more if rows else paragraph("There is none.")


def _index(found: Sequence[Case], questions: Mapping[str, Question]) -> str:
    lines = []
    for category in sorted({_category(case, questions) for case in found}):
        its = dict.fromkeys(case.question for case in found if _category(case, questions) == category)
        lines.append(f"<p>{escape(category)}: {' '.join(_link(name) for name in sorted(its, key=by_number))}</p>\n")
    return "".join(lines)


def _questions(found: Sequence[Case], known: AnswerFiles, one: str, other: str) -> str:
    answers = by_question(known.answers)
    of_question: dict[str, list[Case]] = {}
    for case in found:
        of_question.setdefault(case.question, []).append(case)
    shown = []
    for question in sorted(of_question, key=by_number):
        rows = [_verdicts(case) for case in of_question[question]]
        said = "".join(
            f"<dt>{escape(answer.system)}</dt><dd>{escape(answer.answer)}</dd>\n"
            for answer in answers.get(question, {}).values()
        )
        shown.append(
            f'<div class="sample" id="{_anchor(question)}">\n'
            f'<div class="prompt"><strong>{escape(question)}</strong> '
            f"{escape(_asked(question, known.questions))}</div>\n"
            + table(["answers of", one, other], rows, left=["answers of", one, other])
            + (details("answers", f"<dl>{said}</dl>\n") if said else "")
            + "</div>\n"
        )
    return "".join(shown)


def _verdicts(case: Case) -> list[str]:
    return [escape(f"{case.pair[0]}, {case.pair[1]}"), _preferred(case, case.one), _preferred(case, case.other)]


def _preferred(case: Case, share: float) -> str:
    """Return whom a rater prefers, and how clearly where that is not with all verdicts."""
    if share == 0.5:
        return "neither"
    winner, its = (case.pair[0], share) if share > 0.5 else (case.pair[1], 1 - share)
    return escape(winner if its == 1 else f"{winner} ({its:.0%})")


def _category(case: Case, questions: Mapping[str, Question]) -> str:
    asked = questions.get(case.question)
    return (asked.category if asked else "") or NO_CATEGORY


def _asked(question: str, questions: Mapping[str, Question]) -> str:
    asked = questions.get(question)
    return asked.prompt if asked else ""


def _anchor(question: str) -> str:
    return f"question-{quote(question, safe='')}"


def _link(question: str) -> str:
    return f'<a href="#{quote(_anchor(question), safe="")}">{escape(question)}</a>'
