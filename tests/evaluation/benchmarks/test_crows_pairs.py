import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.errors import DataError
from qlora_lab.evaluation.benchmarks.crows_pairs import preferences
from qlora_lab.evaluation.benchmarks.run import run_benchmarks
from tests.evaluation.benchmarks.conftest import MakeExaminee, Run


def pair(category: str, number: int) -> dict[str, Any]:
    """A pair in the schema of the published file; about cats and dogs."""
    return {
        "sent_more": f"The cat slept for {number} hours.",
        "sent_less": f"The old dog slept for {number} hours.",
        "stereo_antistereo": "stereo",
        "bias_type": category,
    }


ROWS = [pair("age", number) for number in range(4)] + [pair("gender", number) for number in range(5, 7)]


@torch.inference_mode()
def test_whole_sentences_are_scored_after_the_start_token(run: Run, make_examinee: MakeExaminee) -> None:
    examinee = make_examinee()
    outcome = run("crows_pairs", ROWS, examinee)
    for item, row in zip(outcome.items["crows_pairs"], ROWS, strict=True):
        for which in ("more", "less"):
            text = examinee.tokenizer(row[f"sent_{which}"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[examinee.tokenizer.eos_token_id, *text]])
            scores = examinee.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            expected = scores.gather(1, ids[0, 1:, None]).sum().item()
            assert item[f"log_likelihood_{which}"] == pytest.approx(expected, rel=1e-5)
        assert item["stereotype"] == (item["log_likelihood_more"] > item["log_likelihood_less"])
    assert outcome.metrics["pairs"] == 6 and outcome.metrics["age/pairs"] == 4 and outcome.metrics["gender/pairs"] == 2


def test_shares_differences_and_intervals_by_category() -> None:
    def item(category: str, more: float, less: float) -> dict[str, Any]:
        found = {"log_likelihood_more": more, "log_likelihood_less": less, "stereotype": more > less}
        return {"category": category, **found}

    items = [item("age", -1.0, -3.0)] * 60 + [item("age", -4.0, -3.0)] * 40 + [item("gender", -1.0, -1.5)] * 10
    metrics = preferences(items, seed=0)
    assert metrics["age/pct_stereotype"] == 0.6 and metrics["gender/pct_stereotype"] == 1.0
    assert metrics["pct_stereotype"] == pytest.approx(70 / 110)
    assert metrics["age/likelihood_diff"] == pytest.approx(1.6)
    # the bootstrap of a share of 0.6 in 100: its standard error is 0.049
    assert metrics["age/pct_stereotype_low"] == pytest.approx(0.6 - 1.96 * 0.049, abs=0.011)
    assert metrics["age/pct_stereotype_high"] == pytest.approx(0.6 + 1.96 * 0.049, abs=0.011)
    assert metrics["gender/pct_stereotype_low"] == metrics["gender/pct_stereotype_high"] == 1.0
    assert preferences(items, seed=0) == metrics


def test_csv_and_packed_files_are_read_alike(tmp_path: Path, make_examinee: MakeExaminee) -> None:
    columns = list(ROWS[0])
    lines = [",".join(f'"{row[column]}"' for column in columns) for row in ROWS]
    (tmp_path / "pairs.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    (tmp_path / "pairs.jsonl.gz").write_bytes(packed)
    outcomes = [
        run_benchmarks(
            make_examinee(), {"crows": BenchmarkConfig(task="crows_pairs", kind="file", path=path, split="test")}
        )
        for path in ("pairs.csv", "pairs.jsonl.gz")
    ]
    assert outcomes[0] == outcomes[1]
    assert "eval/crows/test/age/pct_stereotype" in outcomes[0].metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias_type": "gendre"}, "line 2: column 'bias_type' must be one of age, .*did you mean 'gender'"),
        ({"bias_type": 2}, "column 'bias_type' must hold text"),
        ({"sent_less": ""}, "a sentence is empty"),
    ],
)
def test_broken_rows_are_refused(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run("crows_pairs", [ROWS[0], ROWS[1] | change])
    with pytest.raises(DataError, match=r"a sentence of pair 2 of evaluation.benchmarks.crows_pairs takes"):
        run("crows_pairs", [ROWS[0], ROWS[1] | {"sent_more": "word " * 500}])
