"""Prompts are read from questions and data sets, or refused by file and line; none is ever cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.config.schema import PromptSetConfig
from qlora_lab.data.prompts import find_prompt_format
from qlora_lab.data.rows import Turn
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.evaluation.generate import Stops
from qlora_lab.evaluation.prompt_sets import Prompt, encode_prompts, fitting, prompts_digest, read_prompts, turn_ends
from qlora_lab.models.byte_level import ByteLevelTokenizer
from qlora_lab.ratings.answers import read_questions

Read = Callable[..., list[Prompt]]
STUDY = (
    '{"question_id": 1, "text": "Why?", "category": "generic"}\n{"question_id": 2, "text": "How?", "category": ""}\n'
)
FASTCHAT = '{"question_id": 7, "category": "math", "turns": ["One?", "Two?"]}\n'
OWN = '{"question": "a", "prompt": "Who?"}\n'


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(content: str, name: str = "asked.jsonl", **settings: Any) -> list[Prompt]:
        (tmp_path / name).write_text(content)
        config = PromptSetConfig(path=name, **settings)
        config.check("evaluation.prompts.mine")
        return read_prompts("mine", config, data_dir=tmp_path, cache_dir=tmp_path, revisions={})

    return read


@pytest.mark.parametrize("content", [STUDY, FASTCHAT, OWN], ids=["study", "fastchat", "own"])
def test_questions_are_those_of_the_ratings(read: Read, tmp_path: Path, content: str) -> None:
    found = read(content)
    asked = read_questions(tmp_path / "asked.jsonl").values()
    assert [(each.question, each.category, each.text) for each in found] == [
        (each.question, each.category, each.prompt) for each in asked
    ]
    assert found[0].shown == found[0].text


@pytest.mark.parametrize("key", ["path", "system_prompt"])
def test_probes_keep_their_own_prompts(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"probes\.{key} is of no use when .*kind is 'probes'"):
        PromptSetConfig(kind="probes", **{key: "mine.jsonl"}).check("evaluation.prompts.probes")


def test_prompts_of_a_data_set_are_its_rows_without_their_answers(read: Read) -> None:
    chats = [
        [("user", "Hi?"), ("assistant", "Yes."), ("user", "And now?"), ("assistant", "No.")],
        [("system", "Be brief."), ("user", "Bye?"), ("assistant", "Bye.")],
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]}) for chat in chats]
    found = read("\n".join(lines), template="messages_last_reply")
    assert [(each.question, each.text) for each in found] == [("1", "And now?"), ("2", "Bye?")]
    assert found[0].shown == "Human:\nHi?\n\nAssistant:\nYes.\n\nHuman:\nAnd now?"
    assert found[1].history == (Turn("system", "Be brief."),)
    limited = read("\n".join(lines), template="messages_last_reply", limit=1, system_prompt="Rhyme.")
    assert [each.history[0] for each in limited] == [Turn("system", "Rhyme.")]
    replaced = read("\n".join(lines), template="messages_last_reply", system_prompt="Rhyme.")
    assert replaced[1].history == (Turn("system", "Rhyme."),)


@pytest.mark.parametrize(
    ("content", "settings", "sentence"),
    [
        (OWN + '{"question": "b"}\n', {}, r"asked\.jsonl, line 2 must have a question .* and a prompt"),
        (OWN + OWN, {}, r"asked\.jsonl, line 2: question a comes twice"),
        (OWN + "{torn\n", {}, r"asked\.jsonl has 1 broken row: line 2"),
        (OWN + '{"question": "b", "prompt": " "}\n', {}, "prompt set 'mine' has nothing to ask in 'b'"),
        ("", {}, "prompt set 'mine' holds no prompt"),
        (OWN, {"template": "alpaca"}, r"asked\.jsonl has 1 broken row: line 1: column 'instruction' is missing"),
    ],
    ids=["no prompt", "twice", "no JSON", "blank", "empty", "another template"],
)
def test_a_bad_file_is_refused_by_line(read: Read, content: str, settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read(content, **settings)


def test_a_missing_file_is_refused_by_its_own_key(tmp_path: Path) -> None:
    config = PromptSetConfig(path="none.jsonl")
    with pytest.raises(DataError, match=r"evaluation\.prompts\.mine\.path 'none\.jsonl' was not found"):
        read_prompts("mine", config, data_dir=tmp_path, cache_dir=tmp_path, revisions={})


def test_the_digest_is_of_the_content(read: Read) -> None:
    assert prompts_digest(read(STUDY)) == prompts_digest(read(STUDY, name="copy.jsonl"))
    assert prompts_digest(read(STUDY)) != prompts_digest(read(STUDY, limit=1))
    assert prompts_digest(read(STUDY)) != prompts_digest(read(STUDY, system_prompt="Rhyme."))


def test_a_prompt_is_encoded_whole_with_what_was_said_before() -> None:
    tokenizer = ByteLevelTokenizer()
    formatted = find_prompt_format("chatml", tokenizer)
    prompts = [Prompt("1", "", "x" * 3000), Prompt("2", "", "So?", (Turn("system", "Rhyme."),))]
    long, short = (str(tokenizer.decode(ids)) for ids in encode_prompts(prompts, formatted, tokenizer))
    assert long.count("x") == 3000
    assert short == "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_without_room_for_an_answer_are_named_or_skipped() -> None:
    prompts = [Prompt(name, "", "?") for name in "abcde"]
    encoded = [[1] * length for length in (10, 11, 9, 12, 10)]
    with pytest.raises(DataError, match=r"2 of 5 prompts are longer than the 10 tokens .*: 'b', 'd'; lower"):
        fitting("mine", prompts, encoded, 10, skip=False)
    assert fitting("mine", prompts, encoded, 10, skip=True) == [0, 2, 4]
    assert fitting("mine", prompts, encoded, 12, skip=False) == [0, 1, 2, 3, 4]


def test_what_ends_a_turn_is_a_control_token_or_the_next_speaker(tokenizer: Any) -> None:
    assert turn_ends("chatml", tokenizer, ["### Human:"]) == Stops((), ("<|im_end|>", "### Human:"))
    assert turn_ends("plain", tokenizer, []) == Stops((), ("\n\nHuman:",))
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>", unk_token="<unknown>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    ends = turn_ends("chatml", tokenizer, [])
    assert ends == Stops((tokenizer.convert_tokens_to_ids("<|im_end|>"),), ())
