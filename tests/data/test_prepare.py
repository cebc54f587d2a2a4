import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import (
    BenchmarkConfig,
    DataConfig,
    EvaluationConfig,
    EvaluationSetConfig,
    FilterConfig,
    RowsConfig,
    SourceConfig,
)
from qlora_lab.data import pool as pools
from qlora_lab.data.prepare import PreparedData, prepare_data
from qlora_lab.errors import ConfigError, DataError

PROCEDURAL = EvaluationSetConfig(kind="procedural", template="procedural")


def questions(path: Path, count: int, first: int = 0, exact_match: bool = False) -> EvaluationSetConfig:
    """Write a file of rows and return the source it is, for training or as an evaluation set."""
    lines = [json.dumps({"question": f"Question {n}?", "answer": f"Answer {n}"}) for n in range(first, first + count)]
    path.write_text("\n".join(lines))
    return EvaluationSetConfig(kind="file", template="question_answer", path=str(path), exact_match=exact_match)


@pytest.fixture
def prepare(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Any:
    def run(source: SourceConfig, evaluation: EvaluationConfig, seed: int = 0, **data: Any) -> PreparedData:
        return prepare_data(
            DataConfig(name="some_set", source=source, **data),
            evaluation,
            prompt_format="chatml",
            tokenizer=byte_tokenizer,
            seed=seed,
            cache_dir=tmp_path,
            data_dir=tmp_path,
        )

    return run


def held_out_keys(prepared: PreparedData, name: str = "held_out") -> list[str]:
    return [item.example.key for item in prepared.held_out[name]]


def train_keys(prepared: PreparedData) -> list[str]:
    return [example.key for example in prepared.train]


def test_same_rows_are_held_out_of_every_arm(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "rows.jsonl", 60)
    evaluation = EvaluationConfig(rows=20)
    arms = [
        prepare(source, evaluation, seed=0, rows=10),
        prepare(source, evaluation, seed=1, rows=40, wrong_answer_share=0.5),
        prepare(source, evaluation, seed=2),
    ]
    assert len(held_out_keys(arms[0])) == 20
    for arm in arms[1:]:
        assert held_out_keys(arm) == held_out_keys(arms[0])
    for arm in arms:
        assert not set(train_keys(arm)) & set(held_out_keys(arm))
    assert [len(arm.train) for arm in arms] == [10, 40, 40]
    assert arms[1].report.wrong_answers == 20
    assert train_keys(arms[0]) != train_keys(prepare(source, evaluation, seed=3, rows=10))


def test_procedural_arms_share_evaluation_and_exclude_it(prepare: Any) -> None:
    small = prepare(PROCEDURAL, EvaluationConfig(), seed=0, rows=128)
    large = prepare(PROCEDURAL, EvaluationConfig(), seed=1, rows=2048, wrong_answer_share=0.5)
    assert held_out_keys(small) == held_out_keys(large)
    assert len(set(held_out_keys(small))) == 128
    assert not set(held_out_keys(small)) & {*train_keys(small), *train_keys(large)}
    assert large.report.wrong_answers == 1024
    assert large.report.wrong_answers_impossible == 0
    assert {item.example.family for item in small.held_out["held_out"]} == {e.family for e in small.train}
    item = small.held_out["held_out"][0]
    assert item.prompt.startswith("<|im_start|>user\n")
    assert list(item.prompt_ids) == list(item.example.input_ids[: item.example.target_start])


@pytest.mark.parametrize("kind", ["file", "procedural"])
def test_evaluation_seed_alone_chooses_the_rows(prepare: Any, tmp_path: Path, kind: str) -> None:
    source = PROCEDURAL if kind == "procedural" else questions(tmp_path / "rows.jsonl", 60)
    rows = held_out_keys(prepare(source, EvaluationConfig(rows=20, seed=5), seed=0, rows=6))
    assert rows == held_out_keys(prepare(source, EvaluationConfig(rows=20, seed=5), seed=1, rows=12))
    assert rows[:10] == held_out_keys(prepare(source, EvaluationConfig(rows=10, seed=5), seed=0, rows=6))
    assert rows != held_out_keys(prepare(source, EvaluationConfig(rows=20, seed=6), seed=0, rows=6))


def test_rows_that_overlap_the_evaluations_own_sets_are_removed(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "train.jsonl", 50)
    sets = {
        "near": questions(tmp_path / "near.jsonl", 10, first=45),
        "tasks": PROCEDURAL,
        "far": questions(tmp_path / "far.jsonl", 10, first=90),
    }
    prepared = prepare(source, EvaluationConfig(rows=10, sets=sets))
    assert list(prepared.held_out) == ["near", "tasks", "far"]
    assert [len(items) for items in prepared.held_out.values()] == [10, 10, 10]
    assert prepared.report.overlap_removed == {"near": 5, "tasks": 0, "far": 0}
    assert len(prepared.train) == 45


def test_duplicates_of_held_out_questions_are_removed_and_counted(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "rows.jsonl", 30)
    path = tmp_path / "rows.jsonl"
    shouted = path.read_text().replace("Question", "QUESTION ").replace("Answer", "Other")
    path.write_text(path.read_text() + "\n" + shouted)
    prepared = prepare(source, EvaluationConfig(rows=10))
    assert prepared.report.overlap_removed == {"held_out": 10}
    assert "10 training rows removed for overlap" in prepared.report.summary()
    assert len(prepared.train) == 40


def test_arms_with_other_limits_are_scored_on_the_same_targets(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "rows.jsonl", 60)
    evaluation = EvaluationConfig(rows=20, max_target_tokens=9, max_source_tokens=80)
    scored = [
        [(list(item.example.input_ids), item.example.target_bytes) for item in prepared.held_out["held_out"]]
        for prepared in (
            prepare(source, evaluation, max_target_tokens=4, max_source_tokens=70),
            prepare(source, evaluation, max_target_tokens=200, max_source_tokens=200),
        )
    ]
    assert scored[0] == scored[1]
    assert all(target_bytes == 8 for _, target_bytes in scored[0])  # "Answer 12" less its end, for eos


def test_limits_of_evaluation_are_named_as_its_own(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "rows.jsonl", 30)
    with pytest.raises(DataError, match=r"try evaluation\.max_source_tokens="):
        prepare(source, EvaluationConfig(rows=10, max_source_tokens=5))


def test_a_leaked_row_is_found_on_the_result(prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check sees rows, not how they were chosen: here whoever should remove overlap does not."""
    monkeypatch.setattr(pools, "overlap", lambda keys, held_out: dict.fromkeys(held_out, np.zeros(0, dtype=np.int64)))
    with pytest.raises(DataError, match="held_out"):
        prepare(questions(tmp_path / "rows.jsonl", 30), EvaluationConfig(rows=10))


def test_exact_match_is_a_matter_of_each_set(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "train.jsonl", 20)
    chat = questions(tmp_path / "chat.jsonl", 10, first=50)
    sums = questions(tmp_path / "sums.jsonl", 10, first=80, exact_match=True)
    sets = EvaluationConfig(rows=10, sets={"chat": chat, "sums": sums})
    for of_training in (True, False):
        assert prepare(source, sets, exact_match=of_training).exact_match_sets == {"sums"}
    assert prepare(source, EvaluationConfig(rows=10), exact_match=True).exact_match_sets == {"held_out"}
    assert prepare(source, EvaluationConfig(rows=10), exact_match=False).exact_match_sets == frozenset()


def test_an_exact_answer_that_cannot_be_written_is_refused(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "rows.jsonl", 9)  # "Answer 1": 8 bytes are 8 tokens
    # cutting the target does not make the right answer shorter
    short = EvaluationConfig(rows=4, max_new_tokens=7, max_target_tokens=5)
    with pytest.raises(ConfigError, match=r"evaluation\.max_new_tokens must be at least 8, .* 'held_out'; got 7"):
        prepare(source, short, exact_match=True)
    assert prepare(source, short).held_out
    assert prepare(source, EvaluationConfig(rows=4, max_new_tokens=8), exact_match=True).held_out


def test_evaluation_is_scored_on_the_target_whatever_training_is_on(prepare: Any, tmp_path: Path) -> None:
    prepared = prepare(questions(tmp_path / "rows.jsonl", 30), EvaluationConfig(rows=10), loss_on="everything")
    assert {example.loss_start for example in prepared.train} == {1}
    for item in prepared.held_out["held_out"]:
        assert item.example.loss_start == item.example.target_start > 1
        assert item.target.startswith("Answer")


def test_report_counts_everything_and_prints_one_line(prepare: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    source = questions(path, 30)
    path.write_text(path.read_text() + '\n{"question": "Empty?", "answer": ""}')
    evaluation = EvaluationConfig(rows=10, max_target_tokens=9)
    prepared = prepare(source, evaluation, max_target_tokens=9, wrong_answer_share=0.5)
    counts = prepared.report.to_dict()
    json.dumps(counts)
    assert counts["train"]["rows_read"] == 31
    assert counts["train"]["empty_targets"] == 1
    assert counts["train"]["rows"] == 20
    assert counts["wrong_answers"] == 10
    assert counts["held_out"]["held_out"]["rows"] == 10
    assert counts["train"]["targets_truncated"] + counts["held_out"]["held_out"]["targets_truncated"] > 15
    assert counts["train"]["tokens"] == sum(example.length for example in prepared.train)
    summary = prepared.report.summary()
    assert summary.startswith(f"data: 20 training rows ({counts['train']['tokens']:,} tokens, ")
    assert "), 10 rows held out as held_out, 10 wrong answers put in; training: 1 rows with an empty target" in summary
    assert summary.endswith(f"evaluation: {counts['held_out']['held_out']['targets_truncated']} targets truncated")
    assert "\n" not in summary


def test_too_few_rows_are_refused_with_counts(prepare: Any, tmp_path: Path) -> None:
    source = questions(tmp_path / "rows.jsonl", 30)
    with pytest.raises(DataError, match=r"asks for 31 rows but .* 'held_out' has 30 different questions"):
        prepare(source, EvaluationConfig(rows=31))
    with pytest.raises(DataError, match="'some_set' has no row left to train on: all 30 ask"):
        prepare(source, EvaluationConfig(rows=30))
    with pytest.raises(DataError, match=r"data\.rows asks for 21 rows but 20 are left"):
        prepare(source, EvaluationConfig(rows=10), rows=21)


def test_set_whose_every_target_is_truncated_away_is_refused(prepare: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"source": f"q{n}", "target": f"   {n}"}) for n in range(9)))
    source = SourceConfig(kind="file", template="procedural", path=str(path))
    with pytest.raises(DataError, match="no row of some_set has a target left to learn"):
        prepare(source, EvaluationConfig(rows=2), max_target_tokens=3)


def test_procedural_source_needs_rows_and_its_template(prepare: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.rows must be set"):
        prepare(PROCEDURAL, EvaluationConfig())
    with pytest.raises(ConfigError, match=r"data\.source\.template must be procedural"):
        prepare(SourceConfig(kind="procedural", template="alpaca"), EvaluationConfig(), rows=10)


def test_training_rows_are_compared_with_benchmarks_and_further_sets(prepare: Any, tmp_path: Path) -> None:
    def words(letter: str, number: int) -> str:
        return " ".join(f"{letter}{number}{ending}" for ending in "uvwxyz")

    rows = [{"question": words("q", number), "answer": words("a", number)} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = SourceConfig(kind="file", template="question_answer", path="rows.jsonl")
    exam, asked = tmp_path / "exam.jsonl", tmp_path / "asked.jsonl"
    exam.write_text(json.dumps({"question": "Which?", "choices": ["this", f"It was {words('q', 3)}"]}))
    asked.write_text(json.dumps({"turns": [{"role": "user", "text": f"Is {words('a', 7)} right?"}]}))
    evaluation = EvaluationConfig(rows=4, sets={"others": questions(tmp_path / "others.jsonl", 8)})
    evaluation.benchmarks["exam"] = BenchmarkConfig(kind="file", path="exam.jsonl", task="mmlu")
    assert len(prepare(source, evaluation).train) == 20  # nothing is compared unasked
    further = {"asked": RowsConfig(kind="file", path="asked.jsonl")}
    chosen = FilterConfig(contamination_words=5, contamination_sets=further)
    for _ in range(2):  # the second time from the cache
        found = prepare(source, evaluation, filter=chosen)
        assert found.report.filtered == {"words of an evaluation row": 2}
        assert {row["because"]: row["row"] for row in found.removed} == {
            "set 'exam'": words("q", 3), "set 'asked'": words("q", 7)
        }  # fmt: skip
    exam.write_text(json.dumps({"question": "Another?"}))
    assert prepare(source, evaluation, filter=chosen).report.filtered == {"words of an evaluation row": 1}
    exam.write_text("{")
    with pytest.raises(DataError, match=r"exam\.jsonl has 1 broken row"):
        prepare(source, evaluation, filter=chosen)
    exam.unlink()
    with pytest.raises(DataError, match=r"evaluation\.benchmarks\.exam\.path 'exam\.jsonl' was not found"):
        prepare(source, evaluation, filter=chosen)
