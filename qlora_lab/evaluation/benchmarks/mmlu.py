"""MMLU (Hendrycks et al. 2021): multiple choice over 57 subjects, with worked examples of the subject before it.

The prompt is that of the original code, and the answer the likeliest of the four letters after it. Two protocols read
the same logits: `hendrycks_micro` weighs every question alike, `qlora_macro` every subject alike, as the QLoRA study
did. A prompt that is too long loses worked examples, the last first, as in the original; never a part of its question.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_lab.config.schema import BenchmarkConfig, RowsConfig
from qlora_lab.data.prompts import data_ids
from qlora_lab.errors import DataError, ModelError
from qlora_lab.evaluation.benchmarks.examinee import Examinee, Texts, check_fits
from qlora_lab.evaluation.benchmarks.items import BenchmarkScores, ItemReader, Ready, spread
from qlora_lab.evaluation.benchmarks.likelihood import Advance, next_token_logits
from qlora_lab.evaluation.benchmarks.mmlu_rows import LETTERS, Question, question_of


@dataclass(frozen=True)
class Prompt:
    """A question with as many worked examples as fit.

    Attributes:
        ids: of the whole prompt.
        shots: worked examples in it.
        shared: the beginning that it shares with other prompts, as text; empty where it shares none.
        shared_tokens: of that beginning.
    """

    ids: list[int]
    shots: int
    shared: str
    shared_tokens: int


@dataclass(frozen=True)
class Letters:
    """The answers in tokens: what all of them begin with (mostly nothing), and the token in which they differ."""

    lead: tuple[int, ...]
    ids: tuple[int, ...]


def mmlu(examinee: Examinee, config: BenchmarkConfig, reader: ItemReader) -> Ready:
    """Make every question ready.

    Raises:
        DataError: rows of another schema, a subject without enough worked examples, or a question that does not fit.
        ModelError: the tokenizer has no token each for the letters.
    """
    texts = Texts.of(examinee)
    questions = spread(_read(reader, config, config), config.rows)
    shots = _worked_examples(reader, config, questions)
    letters = _letters(texts)
    prompts = _prompts(texts, letters, examinee, config, questions, shots)

    def score(advance: Advance) -> BenchmarkScores:
        logits, tokens = _logits(examinee, prompts, letters, advance)
        items = [
            _item(number, questions[number], prompts[row], logits[row].tolist()) for row, number in enumerate(questions)
        ]
        fewer = sum(item["shots"] < config.shots for item in items)
        unshared = sum(prompt.shots > 0 and not prompt.shared for prompt in prompts)
        return BenchmarkScores(
            {
                **accuracies(items),
                "questions": len(items),
                "questions_with_fewer_shots": fewer,
                "questions_without_shared_prefix": unshared,
                "tokens": tokens,
            },
            items,
        )

    return Ready(len(prompts), score)


def accuracies(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return both protocols' accuracy over item records, which name a `subject` and say whether it is `correct`."""
    subjects: dict[str, list[bool]] = defaultdict(list)
    for item in items:
        subjects[item["subject"]].append(item["correct"])
    return {
        "hendrycks_micro": sum(map(sum, subjects.values())) / len(items),
        "qlora_macro": sum(sum(right) / len(right) for right in subjects.values()) / len(subjects),
    }


def _read(reader: ItemReader, config: BenchmarkConfig, source: RowsConfig, key: str = "") -> list[Question]:
    return reader.read(source, lambda columns: question_of(columns, config.header), key)


def _worked_examples(
    reader: ItemReader, config: BenchmarkConfig, questions: Mapping[int, Question]
) -> dict[str, list[str]]:
    """Return the worked examples of each subject, where some questions do not bring enough of their own."""
    lacking = {question.subject: None for question in questions.values() if len(question.own_shots) < config.shots}
    if not lacking:
        return {}
    place = reader.place
    if config.examples is None:
        raise DataError(
            f"{place}.shots is {config.shots}, but questions of {', '.join(list(lacking)[:3])} bring fewer worked "
            f"examples in their input; give {place}.examples (a source of solved questions), or set {place}.shots=0"
        )
    found: dict[str, list[str]] = defaultdict(list)
    for example in _read(reader, config, config.examples, ".examples"):
        found[example.subject].append(example.solved)
    for subject in lacking:
        if len(found[subject]) < config.shots:
            raise DataError(
                f"{place}.examples has {len(found[subject])} worked examples of {subject}, and {place}.shots is "
                f"{config.shots}; give more of them, or set fewer shots"
            )
    return found


def _letters(texts: Texts) -> Letters:
    """Find the tokens of " A" to " D" after "Answer:".

    Raises:
        ModelError: they differ in more than one token.
    """
    asked, *answered = data_ids(["Answer:", *(f"Answer: {letter}" for letter in LETTERS)], texts.tokenizer)
    answers = [tuple(ids[len(asked) :]) for ids in answered]
    lead = answers[0][:-1]
    single = all(answer and answer[:-1] == lead for answer in answers) and len({answer[-1] for answer in answers}) == 4
    if not single or any(ids[: len(asked)] != asked for ids in answered):
        raise ModelError(
            "the tokenizer has no single token for each of the letters A, B, C and D after 'Answer:', so MMLU cannot "
            "be scored with one pass a question; set model.tokenizer to one that has"
        )
    return Letters(lead, tuple(answer[-1] for answer in answers))


def _prompts(
    texts: Texts,
    letters: Letters,
    examinee: Examinee,
    config: BenchmarkConfig,
    questions: Mapping[int, Question],
    examples: Mapping[str, Sequence[str]],
) -> list[Prompt]:
    prefixes: dict[str, list[int]] = {}
    prompts = []
    for number, question in questions.items():
        own = len(question.own_shots) >= config.shots
        solved = list((question.own_shots if own else examples[question.subject])[: config.shots])
        while True:
            beginning = question.header + "".join(f"{example}\n\n" for example in solved)
            [ids] = texts.ids([beginning + question.text])
            ids += letters.lead
            if not solved or len(ids) <= examinee.max_length_tokens:
                break
            solved.pop()
        check_fits(len(ids), examinee, f"question {number + 1} ({question.subject})")
        if solved and beginning not in prefixes:
            # without the line breaks at its end, which many tokenizers join with what follows
            prefixes[beginning] = texts.ids([beginning.rstrip("\n")])[0]
        shared = prefixes[beginning] if solved else []
        if not shared or ids[: len(shared)] != shared:  # the tokens of this prompt are split elsewhere
            beginning, shared = "", []
        prompts.append(Prompt(ids, len(solved), beginning, len(shared)))
    return prompts


def _logits(examinee: Examinee, prompts: Sequence[Prompt], letters: Letters, advance: Advance) -> tuple[Tensor, int]:
    """Return the four logits of each prompt, and how many tokens the model processed, padding apart."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt.shared].append(row)
    logits = torch.empty((len(prompts), len(letters.ids)))
    tokens = 0
    for rows in groups.values():
        shared = prompts[rows[0]].shared_tokens
        own = [prompts[row].ids[shared:] for row in rows]
        logits[rows] = next_token_logits(
            examinee.model,
            own,
            letters.ids,
            prefix_ids=prompts[rows[0]].ids[:shared],
            pad_id=examinee.pad_id,
            batch_tokens=examinee.batch_tokens,
            device=examinee.device,
            advance=advance,
        )
        tokens += shared + sum(map(len, own))
    return logits, tokens


def _item(number: int, question: Question, prompt: Prompt, logits: Sequence[float]) -> dict[str, Any]:
    chosen = LETTERS[max(range(len(LETTERS)), key=lambda place: logits[place])]
    return {
        "item": number,
        "subject": question.subject,
        "answer": question.answer,
        "chosen": chosen,
        "correct": chosen == question.answer,
        "logits": logits,
        "shots": prompt.shots,
        "prompt_tokens": len(prompt.ids),
    }
