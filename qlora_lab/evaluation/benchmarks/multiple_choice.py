"""Zero-shot multiple choice by likelihood: HellaSwag, PIQA, ARC and WinoGrande, as lm-evaluation-harness asks them.

Each choice is scored by the log-likelihood of a continuation. `acc` takes the likeliest, `acc_norm` the likeliest per
character of the choice and `acc_bytes` per byte of it in UTF-8, which for English text are nearly always the same.
WinoGrande (Sakaguchi et al. 2020) scores one continuation after two contexts, so only `acc` means anything there.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.data.glue import number_of
from qlora_lab.data.records import BrokenRowError, kind_of, require_text, text_of
from qlora_lab.evaluation.benchmarks.examinee import Examinee, Texts, check_fits
from qlora_lab.evaluation.benchmarks.items import BenchmarkScores, ItemReader, Ready, spread
from qlora_lab.evaluation.benchmarks.likelihood import Advance

Columns = Mapping[str, Any]
UNLABELLED = ("", "-1")  # in splits whose labels are kept back


@dataclass(frozen=True)
class ChoiceQuestion:
    """One question.

    Attributes:
        pairs: of each choice the context and the continuation that is scored.
        choices: their texts, by whose lengths scores are normalised; empty where that means nothing.
        answer: number of the right one.
    """

    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    answer: int


def multiple_choice(
    to_question: Callable[[Columns], ChoiceQuestion | None],
    examinee: Examinee,
    config: BenchmarkConfig,
    reader: ItemReader,
) -> Ready:
    """Make every question of a set ready; items are choices.

    Args:
        to_question: reads a row; None where it has no label.

    Raises:
        DataError: rows of another schema, or a question that does not fit the model's context.
    """
    questions = spread(reader.read(config, to_question), config.rows)
    pairs = Texts.of(examinee).pairs([pair for question in questions.values() for pair in question.pairs])
    owners = [number for number, question in questions.items() for _ in question.pairs]
    for number, pair in zip(owners, pairs, strict=True):
        check_fits(pair.tokens, examinee, f"question {number + 1} of {reader.place}")

    def score(advance: Advance) -> BenchmarkScores:
        scores = iter(examinee.log_likelihoods(pairs, advance))
        items = [
            _item(number, question, [next(scores) for _ in question.pairs]) for number, question in questions.items()
        ]
        names = ("acc", "acc_norm", "acc_bytes") if items[0].keys() >= {"acc_norm"} else ("acc",)
        return BenchmarkScores(
            {**{name: sum(item[name] for item in items) / len(items) for name in names}, "questions": len(items)}, items
        )

    return Ready(len(pairs), score)


def _item(number: int, question: ChoiceQuestion, scores: list[float]) -> dict[str, Any]:
    item: dict[str, Any] = {"item": number, "answer": question.answer, "log_likelihoods": scores}
    item["acc"] = _likeliest(scores, [1.0] * len(scores)) == question.answer
    if question.choices:
        characters, in_bytes = map(len, question.choices), (len(choice.encode()) for choice in question.choices)
        item["acc_norm"] = _likeliest(scores, characters) == question.answer
        item["acc_bytes"] = _likeliest(scores, in_bytes) == question.answer
    return item


def _likeliest(scores: list[float], lengths: Any) -> int:
    normalised = [score / length for score, length in zip(scores, lengths, strict=True)]
    return normalised.index(max(normalised))


def hellaswag(columns: Columns) -> ChoiceQuestion | None:
    """HellaSwag (Zellers et al. 2019): which ending follows?"""
    if (answer := _number(columns, "label", of=4)) is None:
        return None
    beginning = f"{text_of(columns, 'ctx_a')} {text_of(columns, 'ctx_b').capitalize()}"
    context = _without_markup(f"{text_of(columns, 'activity_label')}: {beginning}")
    return _one_context(context, [_without_markup(ending) for ending in _texts(columns, "endings", least=4)], answer)


def piqa(columns: Columns) -> ChoiceQuestion | None:
    """PIQA (Bisk et al. 2020): which of two ways reaches the goal?"""
    if (answer := _number(columns, "label", of=2)) is None:
        return None
    solutions = [text_of(columns, "sol1"), text_of(columns, "sol2")]
    return _one_context(f"Question: {text_of(columns, 'goal')}\nAnswer:", solutions, answer)


def arc(columns: Columns) -> ChoiceQuestion | None:
    """ARC (Clark et al. 2018), easy or challenge: questions of school science with three to five answers."""
    choices = columns["choices"] if "choices" in columns else text_of(columns, "choices")
    if not isinstance(choices, Mapping):
        raise BrokenRowError(
            f"column 'choices' must hold an object of the lists text and label; got {kind_of(choices)}"
        )
    texts, labels = _texts(choices, "text", least=2), _texts(choices, "label", least=2)
    answer = text_of(columns, "answerKey").strip()
    if answer in UNLABELLED:
        return None
    if answer not in labels or len(labels) != len(texts):
        raise BrokenRowError(f"column 'answerKey' must be one of {', '.join(labels)}; got '{answer}'")
    return _one_context(f"Question: {text_of(columns, 'question')}\nAnswer:", texts, labels.index(answer))


def winogrande(columns: Columns) -> ChoiceQuestion | None:
    """WinoGrande: which of two options fills the blank, told by the likelihood of what follows it."""
    sentence, answer = text_of(columns, "sentence"), text_of(columns, "answer").strip()
    if answer in UNLABELLED:
        return None
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise BrokenRowError("column 'sentence' must hold a blank '_' and words after it")
    if answer not in ("1", "2"):
        raise BrokenRowError(f"column 'answer' must be 1 or 2; got '{answer}'")
    options = (text_of(columns, "option1"), text_of(columns, "option2"))
    pairs = tuple((before + option, f" {after.strip()}") for option in options)
    return ChoiceQuestion(pairs, (), int(answer) - 1)


TASKS: dict[str, Callable[..., Ready]] = {
    "hellaswag": partial(multiple_choice, hellaswag),
    "piqa": partial(multiple_choice, piqa),
    "arc": partial(multiple_choice, arc),
    "winogrande": partial(multiple_choice, winogrande),
}


def _one_context(context: str, choices: list[str], answer: int) -> ChoiceQuestion:
    if not all(choice.strip() for choice in choices):
        raise BrokenRowError("a choice is empty")
    return ChoiceQuestion(tuple((context, f" {choice}") for choice in choices), tuple(choices), answer)


def _without_markup(text: str) -> str:
    """Drop the marks that WikiHow's pages left in HellaSwag, such as [title] and [step]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _number(columns: Columns, name: str, *, of: int) -> int | None:
    """Return the number of the right choice, which may stand as text; None where it is kept back."""
    given = columns[name] if name in columns else text_of(columns, name)
    number = number_of(given)
    if given in UNLABELLED or number == -1:
        return None
    if number is None or number not in range(of):
        shown = f"'{given}'" if isinstance(given, str) else kind_of(given)
        raise BrokenRowError(f"column '{name}' must be a number from 0 to {of - 1}; got {shown}")
    return int(number)


def _texts(columns: Columns, name: str, *, least: int) -> list[str]:
    given = columns[name] if name in columns else text_of(columns, name)
    if not isinstance(given, list) or len(given) < least:
        raise BrokenRowError(f"column '{name}' must hold a list of {least} texts or more; got {kind_of(given)}")
    return [require_text(text, f"column '{name}'") for text in given]
