"""The data sets of conf/data/ over a few rows in their exact schemas: what is learnt of them, and which tokens."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from qlora_lab.config.catalogue import data_sets
from qlora_lab.config.schema import DataConfig
from qlora_lab.data.glue import GLUE_TASKS, SCORES
from qlora_lab.data.prompts import find_prompt_format
from qlora_lab.data.report import SetReport
from qlora_lab.data.rows import Row
from qlora_lab.data.sources import load_rows
from qlora_lab.data.tokenization import Limits, encode_rows
from tests.helpers import composed

FIXTURES = Path(__file__).parent / "fixtures"
SETS = data_sets()
WHOLE_TEXTS = ("conversation_text", "oasst_best_path", "chosen_dialogue")
HUB_SETS = {name for name, data in SETS.items() if data.source.kind == "hub" and data.source.hub_id is not None}

ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response: "
)
ALPACA_PAIRS = [
    (
        ALPACA.format(
            ", paired with an input that provides further context", "Name the colour.", "### Input:\ngrass\n\n"
        ),
        "green",
    ),
    (ALPACA.format("", "Say hello.", ""), "Hello!"),
]
BEES = "### Human: How long do bees live?### Assistant: A worker lives about six weeks.### Human: And queens?"
TREES = "### Human: Nenne drei Bäume.### Assistant: Eiche, Buche, Linde."
CHAT = "<|im_start|>system\nBe brief.<|im_end|>\n"  # of the tokenizer's template, which always begins so


def asks(*turns: str) -> str:
    """Return what the tests' chat template puts before a reply; every other turn is the user's."""
    roles = ["user", "assistant"] * len(turns)
    said = "".join(f"<|im_start|>{role}\n{turn}<|im_end|>\n" for role, turn in zip(roles, turns, strict=False))
    return f"{said}<|im_start|>assistant\n"


# By set, the prompt and target of each row; without a prompt every token is scored.
PAIRS: dict[str, list[tuple[str, str]]] = {
    "oasst1": [("", BEES), ("", TREES)],
    "oasst1_trees": [("", BEES), ("", TREES)],
    "oasst1_chat": [
        (CHAT + asks("How long do bees live?"), "A worker lives about six weeks."),
        (CHAT + asks("Nenne drei Bäume."), "Eiche, Buche, Linde."),
    ],
    "hh_rlhf": [
        ("", "\n\nHuman: May I eat this?\n\nAssistant: What is it?\n\nHuman: A stone.\n\nAssistant: No."),
        ("", "\n\nHuman: Hi!\n\nAssistant: Hello."),
    ],
    "alpaca": ALPACA_PAIRS,
    "alpaca_cleaned": ALPACA_PAIRS,
    "unnatural_core": [
        ("Count the words.\nInput: one two", "2"),
        ("Reverse it: ab", "ba"),
        ("Reverse it: cd", "dc"),
    ],
    "unnatural": [
        ("Count the words.\nInput: one two", "2"),
        ("How many words in one two?", "2"),
        ("Reverse it: ab", "ba"),
    ],
    "self_instruct": [
        ("Add the numbers.\nInput: 2 and 3\nOutput:", "5"),
        ("Task: Name a river.\nOutput:", "The Elbe"),
    ],
    "longform": [
        ("Write about tides.", "The sea rises.\nThe sea falls."),
        ("How do I boil an egg?", "Boil water first."),
    ],
    "chip2": [("Who wrote Faust?", "Goethe wrote it.")],
    "flan_v2": [
        ("Is it true that ice is cold? OPTIONS:\n- yes\n- no", "yes"),
        ("Dog is to puppy as cat is to", "kitten"),
    ],
    "dolly": [("Who is it about?\n\nAda wrote the first program.", "Ada"), ("Name a fruit.", "A pear")],
    "natural_instructions": [
        (
            "Definition: Add the two numbers.\n\nNow complete the following example -\nInput: 2 and 3\nOutput: ",
            "5",
        ),
        (
            "Definition: Say the mood.\n\nNow complete the following example -\nInput: What a day!\nOutput: ",
            "happy",
        ),
    ],
    "no_robots": [
        (f"{CHAT}<|im_start|>system\nBe kind.<|im_end|>\n{asks('Hi')}", "Hello."),
        (f"{CHAT}<|im_start|>system\nBe kind.<|im_end|>\n{asks('Hi', 'Hello.', 'Who are you?')}", "A model."),
        (CHAT + asks("Sing"), "La la"),
    ],
    "ultrachat": [(CHAT + asks("Name a bird"), "Owl"), (CHAT + asks("Name a bird", "Owl", "Another"), "Wren")],
    "glue_cola": [
        ("cola sentence: The cat sat.", "acceptable"),
        ("cola sentence: Cat the sat.", "unacceptable"),
    ],
    "glue_sst2": [("sst2 sentence: a fine film", "positive"), ("sst2 sentence: dull", "negative")],
    "glue_mrpc": [("mrpc sentence1: It rained. sentence2: Rain fell.", "equivalent")],
    "glue_qqp": [("qqp question1: Why rain? question2: Why snow?", "not_duplicate")],
    "glue_stsb": [("stsb sentence1: A dog runs. sentence2: A dog is running.", "4.8")],
    "glue_mnli": [
        ("mnli hypothesis: It is wet. premise: It rains.", "entailment"),
        ("mnli hypothesis: It is Monday. premise: It rains.", "neutral"),
    ],
    "glue_qnli": [("qnli question: Who came? sentence: Ada came.", "entailment")],
    "glue_rte": [("rte sentence1: Ada came home. sentence2: Ada came.", "entailment")],  # the other has no label
    "glue_wnli": [
        (
            "wnli sentence1: The cup fell off the shelf because it was full. sentence2: The shelf was full.",
            "not_entailment",
        )
    ],
}


def local_copy(name: str, file: Path) -> DataConfig:
    """Return a named set with a file in place of its hub rows, as data=NAME data.source.path=FILE composes to."""
    config = OmegaConf.to_object(OmegaConf.merge(SETS[name], {"source": {"path": str(file)}}))
    assert isinstance(config, DataConfig)
    return config


def fixture_of(name: str) -> Path:
    return FIXTURES / f"{'oasst1_trees' if name == 'oasst1_chat' else name}.jsonl"


def loaded(data: DataConfig) -> tuple[list[Row], SetReport]:
    counts = SetReport()
    return load_rows(data.source, cache_dir=FIXTURES, data_dir=FIXTURES, counts=counts), counts


def test_every_hub_set_is_tested() -> None:
    assert set(PAIRS) == HUB_SETS


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_and_scored_tokens(
    name: str, byte_tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    data = local_copy(name, fixture_of(name))
    tokenizer = chat_tokenizer if data.prompt_format == "chat_template" else byte_tokenizer
    rows, _ = loaded(data)
    encoded = encode_rows(
        rows,
        find_prompt_format(data.prompt_format or "plain", tokenizer),
        tokenizer,
        Limits(2000, 2000),
        loss_on=data.loss_on,
        set_name=name,
        counts=SetReport(),
    )
    assert len(encoded) == len(PAIRS[name])
    for (row, example), (prompt, target) in zip(encoded, PAIRS[name], strict=True):
        ids = list(example.input_ids)
        # `plain` puts a line break after a prompt that ends without white space
        shown = f"{prompt}\n" if data.prompt_format is None and prompt and not prompt.endswith(" ") else prompt
        assert row.target == target
        if prompt:
            assert tokenizer.decode(ids[: example.target_start]) == shown
        else:
            assert example.target_start == example.loss_start == 1  # after bos alone
        assert tokenizer.decode(ids[example.loss_start : -1]) == target
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", sorted(HUB_SETS))
def test_a_set_says_what_it_is_and_fits_its_rows(name: str) -> None:
    source = SETS[name].source
    assert SETS[name].name == name
    assert source.licence is not None
    assert (SETS[name].loss_on == "everything") == (source.template in WHOLE_TEXTS)
    task = name.removeprefix("glue_")
    labels = GLUE_TASKS[task].labels if task in GLUE_TASKS else ()
    assert tuple(SETS[name].labels) == (() if labels is SCORES else labels)


def test_what_drops_is_counted_by_its_reason() -> None:
    empty = SetReport(rows_read=3, pairs=3, empty_targets=1)
    no_bot = SetReport(rows_read=2, pairs=1, rows_without_pair={"no answer of the bot": 1})
    no_label = SetReport(rows_read=2, pairs=1, rows_without_pair={"no label": 1})
    for name, counts in {"alpaca": empty, "chip2": no_bot, "glue_rte": no_label}.items():
        assert loaded(local_copy(name, fixture_of(name)))[1] == counts


@pytest.mark.parametrize("name", ["oasst1_trees", "ultrachat", "glue_stsb", "asdiv_half_wrong_1600"])
def test_a_file_means_what_hydra_composes(name: str) -> None:
    assert OmegaConf.to_object(SETS[name]) == composed(f"data={name}").data


def test_a_local_copy_stands_in_for_a_hub_set() -> None:
    path = str(fixture_of("dolly"))
    data = composed("data=dolly", f"data.source.path={path}").data
    assert data == local_copy("dolly", fixture_of("dolly"))
    assert (data.source.kind, data.source.path) == ("file", path)
    spelt_out = composed("data=dolly", "data.source.kind=file", f"data.source.path={path}").data
    assert spelt_out == data


def test_replies_of_one_conversation_are_one_question_and_rows_of_their_own() -> None:
    rows, _ = loaded(local_copy("no_robots", fixture_of("no_robots")))
    first, second, other = rows
    assert first.source_key == second.source_key != other.source_key
    assert len({row.key for row in rows}) == 3
    assert dataclasses.replace(second, history=()).key != second.key
    last_only = local_copy("no_robots", fixture_of("no_robots"))
    last_only.source.template = "messages_last_reply"
    assert loaded(last_only)[0] == [second, other]


def test_whole_trees_give_what_their_messages_give(tmp_path: Path) -> None:
    messages = [json.loads(line) for line in fixture_of("oasst1_trees").read_text().splitlines()]
    nested = {message["message_id"]: message | {"replies": []} for message in messages}
    for message in nested.values():
        if message["parent_id"] is not None:
            nested[message["parent_id"]]["replies"].append(message)
    trees = [{"prompt": message} for message in nested.values() if message["parent_id"] is None]
    (tmp_path / "trees.jsonl").write_text("\n".join(json.dumps(tree) for tree in trees))
    (tmp_path / "shuffled.jsonl").write_text("\n".join(json.dumps(message) for message in reversed(messages)))
    from_messages, _ = loaded(local_copy("oasst1_trees", fixture_of("oasst1_trees")))
    assert loaded(local_copy("oasst1_trees", tmp_path / "trees.jsonl"))[0] == from_messages
    assert [row.family for row in from_messages] == ["en", "de"]
    shuffled, counts = loaded(local_copy("oasst1_trees", tmp_path / "shuffled.jsonl"))
    assert sorted(row.target for row in shuffled) == sorted(row.target for row in from_messages)
    assert counts.rows_read == 2  # trees


def test_the_command_lists_sets_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['data', 'list', 'oasst1', 'sst2']; "
        "runpy.run_module('qlora_lab.data', run_name='__main__'); "
        "assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines["oasst1"][:3] == ["9,846", "timdettmers/openassistant-guanaco", "Apache-2.0"]
    assert lines["oasst1"][3:] == ["conversation_text", "every", "token"]
    assert lines["glue_sst2"][-4:] == ["one", "of", "2", "classes"]
    refused = subprocess.run([sys.executable, "-m", "qlora_lab.data", "lst"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: python -m qlora_lab.data takes a command: list")
