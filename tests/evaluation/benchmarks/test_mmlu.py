import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from qlora_lab.config.schema import BenchmarkConfig, RowsConfig
from qlora_lab.errors import DataError
from qlora_lab.evaluation.benchmarks.items import ItemReader
from qlora_lab.evaluation.benchmarks.mmlu_rows import question_of
from qlora_lab.evaluation.benchmarks.run import run_benchmarks
from tests.evaluation.benchmarks.conftest import MakeExaminee, Run, write_rows

SUBJECTS = {"high_school_biology": 7, "marketing": 3}
HEADER = "The following are multiple choice questions (with answers) about  {}.\n\n"


def hub_rows(subject: str, count: int, *, kind: str = "question") -> list[dict[str, Any]]:
    """Rows in the schema of cais/mmlu."""
    return [
        {
            "question": f" What is {kind} number {number} of {subject}{'?' * number}",
            "subject": subject,
            "choices": [f"choice {letter}{number}" for letter in "wxyz"],
            "answer": (number * 3 + len(subject)) % 4,
        }
        for number in range(count)
    ]


def as_text(row: dict[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def study_rows(shots: int) -> list[dict[str, Any]]:
    """The same questions as the files of the study hold them, with worked examples of their own."""
    return [
        {
            "subject": subject,
            "input": HEADER.format(subject.replace("_", " "))
            + "".join(
                f"{as_text(example)} {'ABCD'[example['answer']]}\n\n"
                for example in hub_rows(subject, 5, kind="example")[:shots]
            )
            + as_text(row),
            "output": "ABCD"[row["answer"]],
        }
        for subject, count in SUBJECTS.items()
        for row in hub_rows(subject, count)
    ]


@pytest.fixture
def questions() -> list[dict[str, Any]]:
    return [row for subject, count in SUBJECTS.items() for row in hub_rows(subject, count)]


@pytest.fixture
def examples(tmp_path: Path) -> RowsConfig:
    rows = [row for subject in SUBJECTS for row in hub_rows(subject, 6, kind="example")]
    write_rows(tmp_path / "dev.jsonl", rows)
    return RowsConfig(kind="file", path="dev.jsonl", split="dev")


def prompts_of(shots: int) -> list[str]:
    return [row["input"] for row in study_rows(shots)]


@torch.inference_mode()
def plain_logits(model: LlamaForCausalLM, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """Score each letter after the whole prompt, one row a time; bytes: a space comes before the letter."""
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt + " ", add_special_tokens=False)["input_ids"]
        rows.append(model(input_ids=torch.tensor([ids])).logits[0, -1])
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
    return torch.stack(rows)[:, letters]


def found_logits(outcome: Any) -> torch.Tensor:
    return torch.tensor([item["logits"] for item in outcome.items["mmlu"]])


@pytest.mark.parametrize("shots", [0, 1, 5])
def test_logits_are_those_of_whole_prompts(
    run: Run, make_examinee: MakeExaminee, questions: Any, examples: RowsConfig, shots: int
) -> None:
    examinee = make_examinee()
    expected = plain_logits(examinee.model, examinee.tokenizer, prompts_of(shots))
    outcome = run("mmlu", questions, examinee, shots=shots, examples=examples if shots else None)
    # float32: a shared prefix and padding change the order of sums
    torch.testing.assert_close(found_logits(outcome), expected, rtol=1e-4, atol=1e-4)
    assert [item["chosen"] for item in outcome.items["mmlu"]] == ["ABCD"[row] for row in expected.argmax(1).tolist()]
    assert outcome.metrics["questions_without_shared_prefix"] == 0


def test_both_protocols_count_what_is_right(run: Run, questions: Any, examples: RowsConfig) -> None:
    outcome = run("mmlu", questions, shots=5, examples=examples)
    items = outcome.items["mmlu"]
    right = [item["chosen"] == "ABCD"[row["answer"]] for item, row in zip(items, questions, strict=True)]
    assert [item["correct"] for item in items] == right
    assert outcome.metrics["hendrycks_micro"] == sum(right) / 10
    assert outcome.metrics["qlora_macro"] == pytest.approx((sum(right[:7]) / 7 + sum(right[7:]) / 3) / 2)
    assert outcome.metrics["questions"] == 10


def test_rows_of_the_study_are_the_same_questions(run: Run, questions: Any, examples: RowsConfig) -> None:
    for shots in (0, 5):
        expected = run("mmlu", questions, shots=shots, examples=examples)
        own = run("mmlu", study_rows(shots), shots=shots)
        assert found_logits(own).tolist() == found_logits(expected).tolist()
    # worked examples of the row's own, fewer of which are wanted, and none of its own, so that others are given
    assert run("mmlu", study_rows(5), shots=2).metrics == run("mmlu", study_rows(2), shots=2).metrics
    given = run("mmlu", study_rows(0), shots=5, examples=examples)
    assert found_logits(given).tolist() == found_logits(expected).tolist()


def test_five_shots_take_a_third_of_the_tokens_and_choose_the_same(
    run: Run, make_examinee: MakeExaminee, examples: RowsConfig
) -> None:
    """Over 30 questions of one subject; most have a hundred and more in the test split."""
    examinee = make_examinee()
    processed: list[int] = []
    decoder: Any = examinee.model.get_decoder()
    count = decoder.register_forward_pre_hook(
        lambda module, args, options: processed.append(options["input_ids"].numel()), with_kwargs=True
    )
    asked = hub_rows("marketing", 30)
    outcome = run("mmlu", asked, examinee, shots=5, examples=examples)
    count.remove()
    assert 3 * sum(processed) <= sum(item["prompt_tokens"] for item in outcome.items["mmlu"])  # padding counts
    assert outcome.metrics["tokens"] <= sum(processed)
    solved = hub_rows("marketing", 5, kind="example")
    beginning = HEADER.format("marketing") + "".join(f"{as_text(row)} {'ABCD'[row['answer']]}\n\n" for row in solved)
    expected = plain_logits(examinee.model, examinee.tokenizer, [beginning + as_text(row) for row in asked])
    assert [item["chosen"] for item in outcome.items["mmlu"]] == ["ABCD"[row] for row in expected.argmax(1).tolist()]


def test_a_prefix_is_run_once_and_batches_change_nothing(
    run: Run, make_examinee: MakeExaminee, questions: Any, examples: RowsConfig
) -> None:
    expected = run("mmlu", questions, shots=5, examples=examples)
    for batch_tokens in (1, 90, 250, 100_000):
        outcome = run("mmlu", questions, make_examinee(batch_tokens=batch_tokens), shots=5, examples=examples)
        # float32: padding and the order of rows change how sums are rounded
        torch.testing.assert_close(found_logits(outcome), found_logits(expected), rtol=1e-4, atol=1e-4)
        assert outcome.metrics == expected.metrics


def test_prompts_whose_tokens_are_split_elsewhere_share_no_prefix(
    run: Run, make_examinee: MakeExaminee, questions: Any, examples: RowsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_lab.models.byte_level import ByteLevelTokenizer

    class Joining(ByteLevelTokenizer):
        """Joins the end of the worked examples with one question's first letters."""

        def tokenize(self, text: str, **options: Any) -> list[str]:
            joined = re.split(r"([ABCD]\n\nWhat is question number 2 of marketing)", text)
            return [
                token
                for number, part in enumerate(joined)
                for token in (["<extra_id_7>"] if number % 2 else super(Joining, self).tokenize(part, **options))
            ]

    examinee = make_examinee(tokenizer=Joining())
    outcome = run("mmlu", questions, examinee, shots=1, examples=examples)
    assert outcome.metrics["questions_without_shared_prefix"] == 1
    expected = plain_logits(examinee.model, examinee.tokenizer, prompts_of(1))
    torch.testing.assert_close(found_logits(outcome), expected, rtol=1e-4, atol=1e-4)


def test_long_prompts_lose_worked_examples_and_never_the_question(
    run: Run, make_examinee: MakeExaminee, questions: Any, examples: RowsConfig
) -> None:
    whole = run("mmlu", questions, shots=5, examples=examples)
    longest = max(item["prompt_tokens"] for item in whole.items["mmlu"])
    examinee = make_examinee(max_length_tokens=longest - 1)
    outcome = run("mmlu", questions, examinee, shots=5, examples=examples)
    shots = [item["shots"] for item in outcome.items["mmlu"]]
    assert set(shots) == {4, 5} and outcome.metrics["questions_with_fewer_shots"] == shots.count(4)
    cut = shots.index(4)
    expected = plain_logits(examinee.model, examinee.tokenizer, [prompts_of(4)[cut]])
    torch.testing.assert_close(found_logits(outcome)[cut : cut + 1], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        DataError, match=r"question 1 \(high_school_biology\) takes \d+ tokens.* is 60; items are never"
    ):
        run("mmlu", questions, make_examinee(max_length_tokens=60), shots=5, examples=examples)


def test_a_part_of_the_questions_is_spread_over_the_set(run: Run, questions: Any) -> None:
    items = run("mmlu", questions, rows=5).items["mmlu"]
    assert [item["item"] for item in items] == [0, 2, 4, 6, 8]
    assert len(run("mmlu", questions, rows=99).items["mmlu"]) == 10


def test_questions_and_worked_examples_come_from_splits_of_a_hub_set(
    make_examinee: MakeExaminee, run: Run, questions: Any, examples: RowsConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    """A folder stands for the repository; `datasets` reads both alike."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = run("mmlu", questions, shots=5, examples=examples)
    solved = [row for subject in SUBJECTS for row in hub_rows(subject, 6, kind="example")]
    (tmp_path / "set").mkdir()
    splits = "".join(f"  - {{split: {split}, path: {split}.parquet}}\n" for split in ("test", "dev"))
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:\n{splits}---\n")
    for split, rows in (("test", questions), ("dev", solved)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / f"{split}.parquet")
    hub = {"kind": "hub", "hub_id": str(tmp_path / "set"), "hub_config": "all"}
    benchmark = BenchmarkConfig(task="mmlu", **hub, split="test", shots=5, examples=RowsConfig(**hub, split="dev"))
    outcome = run_benchmarks(make_examinee(), {"mmlu": benchmark})
    assert outcome.items["mmlu"] == expected.items["mmlu"]
    assert outcome.metrics["eval/mmlu/test/5shot/hendrycks_micro"] == expected.metrics["hendrycks_micro"]


def test_the_file_of_the_study_is_read_whole(data_slices: Path) -> None:
    source = RowsConfig(kind="file", path="qlora_eval/zero_shot_mmlu_val.json")
    found = ItemReader("mmlu", data_slices, data_slices).read(source, lambda columns: question_of(columns, ""))
    assert len(found) == 1531 and len({question.subject for question in found}) == 57
    assert all(not question.own_shots and question.text.count("\nB. ") >= 1 for question in found)
    assert found[0].header == HEADER.format("abstract algebra") and found[0].answer == "A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answer": 4},
            r"line 2: column 'answer' must be one of A, B, C, D, or a number from 0 to 3; got a number \(4\)",
        ),
        ({"answer": "E"}, "got 'E'"),
        ({"choices": ["one", "two"]}, "column 'choices' must hold a list of 4 texts"),
        ({"subject": None}, "column 'subject' must hold text; got null"),
        ({"input": "What?", "output": "A"}, "column 'input' must end in a line 'Answer:'"),
        ({"input": "What?\nAnswer:", "output": "AB"}, "column 'output' must be one of A, B, C, D; got 'AB'"),
    ],
)
def test_rows_of_another_kind_are_refused(run: Run, questions: Any, change: dict[str, Any], message: str) -> None:
    questions[1] |= change
    with pytest.raises(DataError, match=message):
        run("mmlu", questions)


def test_missing_columns_files_and_examples_are_refused(run: Run, questions: Any, examples: RowsConfig) -> None:
    with pytest.raises(DataError, match=r"column 'question' is missing \(columns: 'subject', 'questoin'.*did you mean"):
        run("mmlu", [{"subject": "marketing", "questoin": "?"}])
    with pytest.raises(DataError, match=r"rows.jsonl holds nothing to ask: it has no rows"):
        run("mmlu", [])
    with pytest.raises(DataError, match=r"shots is 5, but questions of high_school_biology, marketing bring fewer"):
        run("mmlu", questions, shots=5)
    with pytest.raises(DataError, match=r"examples has 6 worked examples of high_school_biology, and .*shots is 7"):
        run("mmlu", questions, shots=7, examples=examples)
    with pytest.raises(DataError, match=r"evaluation.benchmarks.mmlu.examples.path 'none.jsonl' was not found"):
        run("mmlu", questions, shots=5, examples=RowsConfig(kind="file", path="none.jsonl"))
