"""Every named template over the real data it is for; needs QLORA_LAB_DATA."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from qlora_lab.config.catalogue import data_sets
from qlora_lab.config.schema import DataConfig, EvaluationConfig, EvaluationSetConfig, SourceConfig
from qlora_lab.data.prepare import prepare_data
from qlora_lab.data.report import SetReport
from qlora_lab.data.sources import load_rows

# file, template, rows, of these with an empty target
SLICES = [
    ("alpaca", "alpaca", 3000, 1),
    ("alpaca", "alpaca_chat", 3000, 1),
    ("alpaca_claude_t45", "alpaca_chat", 3000, 2),
    ("alpaca_cherry_5pct", "alpaca_chat", 2000, 0),
    ("dolly_3k", "alpaca_chat", 1995, 0),
    ("oasst1_guanaco_style", "conversation_text", 69, 0),
    ("oasst1_guanaco_style", "conversation_first_turn", 69, 0),
    ("oasst1_trees", "oasst_best_path", 69, 0),
    ("oasst1_messages", "oasst_best_path", 69, 0),
    ("oa_eval_prompts", "conversation_reply", 628, 0),
    ("oa_eval_prompts", "conversation_first_turn", 628, 346),  # prompts that end before the reply
    ("hh_rlhf_harmless_test", "chosen_dialogue", 1481, 0),
    ("hh_rlhf_harmless_test", "hh_last_turn", 1481, 3),
    ("flan_v2_t0_mix", "prompt_completion", 2500, 0),
    ("flan_v2_cot", "inputs_targets", 2445, 0),
    ("gsm8k_train", "question_answer", 1970, 0),
    ("self_instruct_seed_tasks", "instruction_instances", 120, 0),
    ("self_instruct_user_oriented", "instruction_instances", 179, 0),
    ("bbh", "input_target", 1039, 0),
    ("mmlu_zero_shot_val", "input_output", 995, 0),
]


@pytest.mark.parametrize(("name", "template", "rows", "empty"), SLICES)
def test_template_reads_every_row_of_its_slice(
    instruct_dir: Path, name: str, template: str, rows: int, empty: int
) -> None:
    counts = SetReport()
    source = SourceConfig(kind="file", template=template, path=f"{name}.jsonl.gz")
    loaded = load_rows(source, cache_dir=instruct_dir, data_dir=instruct_dir, counts=counts)
    assert counts == SetReport(rows_read=rows, pairs=rows, empty_targets=empty)
    assert len(loaded) == rows - empty
    whole_texts = template in ("chosen_dialogue", "conversation_text", "oasst_best_path")
    assert all(bool(row.source.strip()) != whole_texts for row in loaded)
    assert not any("<|endoftext|>" in row.target for row in loaded)


def targets(instruct_dir: Path, name: str, template: str) -> list[str]:
    source = SourceConfig(kind="file", template=template, path=f"{name}.jsonl.gz")
    return [row.target for row in load_rows(source, cache_dir=instruct_dir, data_dir=instruct_dir, counts=SetReport())]


def test_the_best_path_of_a_tree_is_the_studys_conversation(instruct_dir: Path) -> None:
    expected = targets(instruct_dir, "oasst1_guanaco_style", "conversation_text")
    assert targets(instruct_dir, "oasst1_trees", "oasst_best_path") == expected
    assert targets(instruct_dir, "oasst1_messages", "oasst_best_path") == expected
    replies = targets(instruct_dir, "oasst1_messages", "oasst_best_replies")
    assert len(replies) == sum(text.count("### Assistant:") for text in expected)


# named set, a slice of its rows: rows with a pair
NAMED = [
    ("alpaca", "alpaca", 2999),
    ("hh_rlhf", "hh_rlhf_harmless_test", 1481),
    ("oasst1", "oasst1_guanaco_style", 69),
    ("self_instruct", "flan_v2_t0_mix", 2500),
    ("flan_v2", "flan_v2_cot", 2445),
]


@pytest.mark.parametrize(("name", "file", "rows"), NAMED)
def test_a_slice_stands_in_for_a_named_set(instruct_dir: Path, name: str, file: str, rows: int) -> None:
    data = OmegaConf.to_object(OmegaConf.merge(data_sets()[name], {"source": {"path": f"{file}.jsonl.gz"}}))
    assert isinstance(data, DataConfig)
    loaded = load_rows(data.source, cache_dir=instruct_dir, data_dir=instruct_dir, counts=SetReport())
    assert len(loaded) == rows


def test_arms_of_different_sets_share_evaluation_and_never_train_on_it(
    instruct_dir: Path, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sets = {
        "chat": EvaluationSetConfig(
            kind="file", template="conversation_first_turn", path="oasst1_guanaco_style.jsonl.gz"
        ),
        "alpaca": EvaluationSetConfig(kind="file", template="alpaca_chat", path="alpaca_cherry_5pct.jsonl.gz"),
    }
    trained_on = {
        "oasst1_guanaco_style": "conversation_text",
        "alpaca": "alpaca",
        "alpaca_cherry_5pct": "alpaca_chat",
    }
    held_out = {}
    for name, template in trained_on.items():
        source = SourceConfig(kind="file", template=template, path=f"{name}.jsonl.gz")
        prepared = prepare_data(
            DataConfig(name=name, source=source, rows=30, max_source_tokens=600),
            EvaluationConfig(rows=30, sets=sets),
            prompt_format="chatml",
            tokenizer=byte_tokenizer,
            seed=0,
            cache_dir=tmp_path,
            data_dir=instruct_dir,
        )
        held_out[name] = {set_name: [e.example.key for e in items] for set_name, items in prepared.held_out.items()}
        removed = prepared.report.overlap_removed
        assert (removed["chat"] >= 30) == (name == "oasst1_guanaco_style")
        assert (removed["alpaca"] >= 30) == (name == "alpaca_cherry_5pct")
    assert held_out["alpaca"] == held_out["oasst1_guanaco_style"] == held_out["alpaca_cherry_5pct"]
