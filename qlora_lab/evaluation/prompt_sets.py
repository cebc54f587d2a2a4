"""Prompts to answer: read from questions or data sets, and put into the format in which a model is asked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import PROBES, QUESTIONS, PromptSetConfig
from qlora_lab.data.prompts import PLAIN_LABELS, PromptFormat, data_ids, find_prompt_format, markup_ids
from qlora_lab.data.records import BrokenRows
from qlora_lab.data.report import SetReport
from qlora_lab.data.rows import ASSISTANT, SYSTEM, USER, Turn
from qlora_lab.data.sources import load_rows, origin_of, read_records
from qlora_lab.errors import DataError
from qlora_lab.evaluation.generate import Stops
from qlora_lab.evaluation.probes import PROBE_SET
from qlora_lab.ratings.answers import questions_of

SHOWN_PROMPTS = 3


@dataclass(frozen=True)
class Prompt:
    """One question, with what was said before it.

    Attributes:
        question: its id in the set.
        category: "" where the set has none.
        text: the user's latest turn.
        history: the turns before it.
    """

    question: str
    category: str
    text: str
    history: tuple[Turn, ...] = ()

    @property
    def shown(self) -> str:
        """What a judge sees as asked: the text, or the whole conversation."""
        if not self.history:
            return self.text
        turns = (*self.history, Turn(USER, self.text))
        return "\n\n".join(f"{PLAIN_LABELS[turn.role]}{turn.text}" for turn in turns)


def read_prompts(
    name: str, config: PromptSetConfig, *, data_dir: Path, cache_dir: Path, revisions: dict[str, str]
) -> list[Prompt]:
    """Read a set of prompts, as many as it is limited to.

    Args:
        name: of the set.
        data_dir: where relative paths are looked up first.
        cache_dir: where fetched wheels lie.
        revisions: gets the commit of a hub set, by its id.

    Raises:
        DataError: it is missing, holds broken rows (named by their lines), or no prompt.
        ModelError: its wheel is not in the cache.
    """
    try:
        prompts = _read(config, data_dir, cache_dir, revisions)
    except DataError as error:  # worded for the data of a run
        raise DataError(str(error).replace("data.source.", f"evaluation.prompts.{name}.")) from error
    empty = [prompt.question for prompt in prompts if not prompt.text.strip()]
    if empty or not prompts:
        what = f"has nothing to ask in {_listed(empty)}" if empty else "holds no prompt"
        raise DataError(f"the prompt set '{name}' {what}; every row must have a prompt")
    if config.system_prompt is not None:
        system = Turn(SYSTEM, config.system_prompt)
        prompts = [
            Prompt(each.question, each.category, each.text, (system, *_without_system(each.history)))
            for each in prompts
        ]
    return prompts[: config.limit]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return a SHA-256 of prompts: of another content it is another evaluation, wherever they were read from."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


def encode_prompts(
    prompts: Sequence[Prompt], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return the tokens of each prompt in its format, never truncated."""
    texts = data_ids([prompt.text for prompt in prompts], tokenizer)
    return [
        prompt_format.following(prompt.history).ids(prompt.text, ids)
        for prompt, ids in zip(prompts, texts, strict=True)
    ]


def fitting(
    name: str, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]], room_tokens: int, *, skip: bool
) -> list[int]:
    """Return the places of the prompts that have room for an answer.

    Args:
        room_tokens: most tokens of a prompt.
        skip: leave out those that are longer.

    Raises:
        DataError: some are longer, and none is to be left out.
    """
    long = [prompt.question for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) > room_tokens]
    if long and not skip:
        raise DataError(
            f"of the prompt set '{name}', {len(long)} of {len(prompts)} prompts are longer than the {room_tokens} "
            f"tokens that model.max_length_tokens leaves beside max_new_tokens: {_listed(long)}; lower "
            f"evaluation.prompts.{name}.max_new_tokens, or leave them out with evaluation.prompts.{name}.too_long=skip"
        )
    return [place for place, ids in enumerate(encoded) if len(ids) <= room_tokens]


def turn_ends(prompt_format: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = ()) -> Stops:
    """Return what ends an assistant's turn in a prompt format, and the texts that do so besides.

    It is the first control token between a reply and the next message, or where there is none, the line with which
    that message begins.
    """
    markup = find_prompt_format(prompt_format, tokenizer).markup((USER, ASSISTANT, USER))
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(tokenizer.all_special_ids)
    ends = [token for token in markup_ids(markup[2], tokenizer) if token in control - {tokenizer.unk_token_id}]
    if ends:
        return Stops((ends[0],), tuple(texts))
    opening = markup[2].lstrip("\n")
    first_line = markup[2][: len(markup[2]) - len(opening)] + opening.partition("\n")[0]
    return Stops((), tuple(dict.fromkeys([*([first_line] if first_line.strip() else []), *texts])))


def _read(config: PromptSetConfig, data_dir: Path, cache_dir: Path, revisions: dict[str, str]) -> list[Prompt]:
    if config.kind == PROBES:
        return [Prompt(probe.name, probe.category, probe.prompt, probe.history) for probe in PROBE_SET]
    if config.template != QUESTIONS:
        rows = load_rows(config, cache_dir=cache_dir, data_dir=data_dir, counts=SetReport(revisions=revisions))
        return [Prompt(str(number), row.family or "", row.source, row.history) for number, row in enumerate(rows, 1)]
    origin = origin_of(config, data_dir)
    broken = BrokenRows(origin)
    records = list(read_records(config, broken, cache_dir, data_dir, revisions))
    broken.raise_if_any()
    questions = questions_of((record.columns, f"{origin}, {record.place}") for record in records)
    return [Prompt(question.question, question.category, question.prompt) for question in questions.values()]


def _without_system(history: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return history[1:] if history and history[0].role == SYSTEM else history


def _listed(questions: Sequence[str]) -> str:
    shown = ", ".join(f"'{question}'" for question in questions[:SHOWN_PROMPTS])
    return shown + (f" and {len(questions) - SHOWN_PROMPTS} more" if len(questions) > SHOWN_PROMPTS else "")
