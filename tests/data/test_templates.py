from typing import Any

import pytest

from qlora_lab.data.records import BrokenRowError
from qlora_lab.data.rows import Row
from qlora_lab.data.templates import TEMPLATES, find_template
from qlora_lab.errors import ConfigError

HH = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Why? \n\nAssistant: Because.\n\nSo it is."
OASST = "### Human: Hi?### Assistant: Hello.### Human: Why?### Assistant: Because."
ALPACA = {"instruction": "Name it.", "input": "a {input} cat", "output": "Tom\n"}


def pairs(template: str, columns: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row.source, row.target) for row in find_template(template).to_rows(columns)]


@pytest.mark.parametrize(
    ("template", "columns", "expected"),
    [
        ("input_output", {"input": " a ", "output": "b\n"}, [("a", "b")]),
        ("input_target", {"input": "a", "target": "b"}, [("a", "b")]),
        ("inputs_targets", {"inputs": "a", "targets": "b"}, [("a", "b")]),
        ("question_answer", {"question": "a", "answer": "b"}, [("a", "b")]),
        ("longform", {"input": "a", "output": "b", "source": "C4", "subset": "c4"}, [("a", "b")]),
        ("prompt_completion", {"prompt": "a\n", "completion": " b <|endoftext|>"}, [("a", "b")]),
        ("alpaca_chat", ALPACA, [("Name it.\n\na {input} cat", "Tom")]),
        ("alpaca_chat", {"instruction": "Sing.", "input": None, "output": "la"}, [("Sing.", "la")]),
        (
            "dolly",
            {"instruction": "Name it.", "context": "a cat", "response": "Tom "},
            [("Name it.\n\na cat", "Tom")],
        ),
        ("chosen_dialogue", {"chosen": HH, "rejected": ""}, [("", HH)]),
        ("conversation_text", {"text": OASST}, [("", OASST)]),
        ("conversation_first_turn", {"text": OASST}, [("Hi?", "Hello.")]),
        ("conversation_first_turn", {"text": "### Human: Hi?"}, []),
        ("conversation_first_turn", {"text": "no marks"}, []),
        ("hh_last_turn", {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yo"}, [("Hi?", "Yo")]),
        ("hh_last_turn", {"chosen": "\n\nHuman: Hi?"}, []),
        ("hh_last_turn", {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"}, []),
        (
            "hh_last_turn",
            {"chosen": HH},
            [("Human: Hi?\n\nAssistant: Hello.\n\nHuman: Why?", "Because.\n\nSo it is.")],
        ),
        ("conversation_reply", {"input": "### Human: Hi? ### Assistant:", "output": " Yo "}, [("Hi?", "Yo")]),
        (
            "conversation_reply",
            {"input": f"{OASST} ### Human: So? ### Assistant:", "output": "Yo"},
            [("Human: Hi?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: So?", "Yo")],
        ),
        ("conversation_reply", {"input": OASST, "output": "Yo"}, []),
        ("conversation_reply", {"input": "### Assistant:", "output": "Yo"}, []),
        ("hh_last_turn", {"chosen": "\n\nAssistant: Yo"}, []),
        ("chip2", {"text": "<human>: Hi?\n<bot>: Hello.", "metadata": ""}, [("Hi?", "Hello.")]),
        ("chip2", {"text": "<human>: Hi?"}, []),
        (
            "instruction_instances",
            {
                "instruction": "Sing.",
                "instances": [{"input": "", "output": "la"}, {"input": "b", "output": "c"}],
            },
            [("Sing.", "la"), ("Sing.\n\nb", "c")],
        ),
        (
            "unnatural_instances",
            {
                "instruction": "x",
                "instances": [{"instruction_with_input": "a", "output": "b", "input": "", "constraints": ""}],
                "reformulations": [{"instruction_with_input": "c", "output": "d"}],
            },
            [("a", "b"), ("c", "d")],
        ),
        ("unnatural_instances", {"instances": [], "reformulations": None}, []),
        (
            "asdiv",
            {"passage": "A cat. ", "question": "How many?", "answer": "1 cat"},
            [("A cat. How many?", "1 cat")],
        ),
        ("procedural", {"source": "a", "target": "b", "family": "f"}, [("a", "b")]),
    ],
)
def test_template_gives_its_pairs(template: str, columns: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert pairs(template, columns) == expected


def test_alpaca_gives_the_benchmarks_prompt() -> None:
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName it.\n\n### Input:\na {input} cat\n\n### Response: "
    )
    without_input = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName it.\n\n### Response: "
    )
    assert pairs("alpaca", ALPACA) == [(with_input, "Tom\n")]
    assert pairs("alpaca", {**ALPACA, "input": ""}) == [(without_input, "Tom\n")]


@pytest.mark.parametrize(
    ("first", "second", "columns"),
    [
        ("alpaca", "alpaca_chat", ALPACA),
        ("chosen_dialogue", "hh_last_turn", {"chosen": HH}),
        ("conversation_text", "conversation_first_turn", {"text": OASST}),
    ],
)
def test_question_is_recognised_across_templates(first: str, second: str, columns: dict[str, Any]) -> None:
    [one] = find_template(first).to_rows(columns)
    [other] = find_template(second).to_rows(columns)
    assert one.source != other.source
    assert one.source_key == other.source_key


def test_family_is_the_column_that_names_the_task() -> None:
    assert find_template("inputs_targets").to_rows({"inputs": "a", "targets": "b", "task": "sums"}) == [
        Row("a", "b", family="sums")
    ]
    [row] = find_template("alpaca_chat").to_rows({**ALPACA, "category": "naming"})
    assert row.family == "naming"


@pytest.mark.parametrize(
    ("template", "columns", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "outptu": "b"},
            r"'output' is missing \(columns: 'instruction', 'outptu'; did",
        ),
        ("question_answer", {"question": "a", "answer": 3}, r"'answer' must hold text; got a number \(3\)"),
        ("question_answer", {"question": None, "answer": "b"}, "'question' must hold text; got null"),
        ("question_answer", {"question": True, "answer": "b"}, r"got true or false \(True\)"),
        ("alpaca", {**ALPACA, "input": ["a"]}, "'input' must hold text; got a list"),
        ("unnatural_instances", {"instances": "a"}, "'instances' must hold a list of objects; got text"),
        ("instruction_instances", {"instruction": "a"}, "'instances' is missing"),
        ("instruction_instances", {"instruction": "a", "instances": [{"input": "b"}]}, "'output' is missing"),
        ("procedural", {"source": " ", "target": "b"}, "'source' is empty"),
    ],
)
def test_row_without_what_the_template_needs_is_broken(template: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(BrokenRowError, match=message):
        find_template(template).to_rows(columns)


def test_every_template_refuses_a_row_of_another_set() -> None:
    for template in TEMPLATES.values():
        with pytest.raises(BrokenRowError, match="is missing"):
            template.to_rows({"something": "else"})


def test_unknown_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 'alpaka'; did you mean 'alpaca'"):
        find_template("alpaka")
