"""Run folders become rows, whatever became of the run."""

import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.load import load_rows, load_runs
from analysis.sources.run_folders import find_run_folders, read_history
from analysis.sources.run_row import read_config_text
from qlora_lab.errors import RunFolderError
from tests.analysis.study_folders import FakeRun, row_key, two_arms, write, write_run, write_study


def by_id(runs: pd.DataFrame) -> dict[str, dict[Hashable, Any]]:
    return {str(run["run_id"]): run for run in runs.to_dict("records")}


def test_one_row_a_run_with_configuration_metrics_and_times(tmp_path: Path) -> None:
    write_study(tmp_path, two_arms())
    runs = load_runs(tmp_path)
    assert list(runs["run_id"]) == ["clean0", "clean1", "wrong0", "wrong1"]  # studies/ is no run
    first = runs.iloc[0]
    assert (first["state"], first["seed"]) == ("finished", 0)
    assert first["config.data.name"] == "procedural_clean_128"
    assert first["config.adapter.rank"] == 8
    assert first["config.data.source.families"].startswith('["add')  # a list is text, so that it can be compared
    assert first["environment.packages.torch"] == "2.13.0+cpu"
    assert first["wall_time_s"] == 64
    assert first["trainable_parameters"] == 2_442_240
    assert first["data.train.rows"] == 128
    reported = json.loads((tmp_path / "clean0" / "result.json").read_text())["metrics"]["eval/loss"]
    assert first["eval/loss"] == reported


def test_a_missing_metric_stays_missing(tmp_path: Path) -> None:
    write_run(tmp_path, FakeRun("with"))
    write_run(tmp_path, FakeRun("without", exact_match=False))
    runs = by_id(load_runs([tmp_path / "with", tmp_path / "without"]))
    assert runs["with"]["eval/exact_match"] > 0
    assert math.isnan(runs["without"]["eval/exact_match"])


def test_a_null_metric_is_missing_and_a_word_is_damage(tmp_path: Path) -> None:
    null, word = write_run(tmp_path, FakeRun("null")), write_run(tmp_path, FakeRun("word"))
    write(null / "result.json", '{"metrics": {"eval/loss": null}}')
    write(word / "result.json", '{"metrics": {"eval/loss": "low"}}')
    runs = by_id(load_runs(tmp_path))
    assert runs["null"]["state"] == "finished"
    assert math.isnan(runs["null"]["eval/loss"])
    assert runs["word"]["state"] == "unreadable"
    assert "eval/loss must be a number or null; got 'low'" in runs["word"]["reason"]


@pytest.mark.parametrize("state", ["failed", "interrupted", "running", "not_started"])
def test_runs_that_did_not_finish_are_rows(tmp_path: Path, state: str) -> None:
    write_run(tmp_path, FakeRun("run", state=state))
    run = load_runs(tmp_path).iloc[0]
    assert run["state"] == state
    assert run["config.data.name"] == "procedural_clean_128"
    if state == "failed":
        assert run["reason"].startswith("TrainingError: the loss is not finite at step 12")
        assert run["traceback"].startswith("Traceback")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("status.json", '{"state": "fini', "status.json cannot be read as JSON"),
        ("status.json", '{"state": "done"}', "state must be one of finished, failed"),
        ("status.json", '{"state": "finished", "started_at": "soon"}', "started_at must be an ISO time"),
        ("result.json", "[1, 2]", "must hold one JSON object; got list"),
        ("config.yaml", "a: [1", "config.yaml cannot be read as YAML"),
        ("config.yaml", "just text", "must hold keys and values; got str"),
        ("config.yaml", None, "config.yaml is not there"),
        ("result.json", None, "status.json says finished, but"),
    ],
)
def test_a_damaged_folder_is_a_row_with_the_reason(tmp_path: Path, file: str, content: str | None, reason: str) -> None:
    folder = write_run(tmp_path, FakeRun("run"))
    (folder / file).unlink()
    if content is not None:
        write(folder / file, content)
    run = load_runs(tmp_path).iloc[0]
    assert (run["run_id"], run["state"]) == ("run", "unreadable")
    assert reason in run["reason"]
    if file != "config.yaml":  # what can be read is there all the same
        assert run["seed"] == 0


def test_numbers_in_yaml_are_numbers_as_people_write_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path, FakeRun("run"))
    write(folder / "config.yaml", "run_id: run\nseed: 0\noptim: {learning_rate: 2e-4, eps: 1E-8, name: e4}\n")
    run = load_runs(tmp_path).iloc[0]
    assert run["config.optim.learning_rate"] == 2e-4
    assert run["config.optim.eps"] == 1e-8
    assert run["config.optim.name"] == "e4"


@pytest.mark.parametrize(
    "text",
    [
        "# by hand\nrun_id: run\nseed: 0\nmodel: {a: [1, 2e-4], b: null}\n",
        "run_id: run\nshared: &x {a: 1}\nseed: 0\nmodel: *x\n",
        "{run_id: run, seed: 0}",
        "'run_id': run\nseed: 0\n",
        "run_id: run\nseed: 0\ntext: |\n  seed: 1\n\n  more\nlist:\n- a: 1\n- b\n",
        "run_id: run\nseed: 1\nmodel: {}\nseed: 0\n",
        'run_id: run\nseed: 0\ntext: "a\n  b: c"\n',
        "run_id: run\nseed: 0\ntext: a\n  b\nmodel:\n  a:\n    b: 1\n",
    ],
)
def test_a_configuration_is_read_as_yaml_has_it_whatever_its_form(text: str) -> None:
    numbers = text.replace("2e-4", "2.0e-4")  # which PyYAML alone reads as text
    assert read_config_text(text, "here") == yaml.safe_load(numbers)


def test_what_is_no_folder_is_refused_and_an_empty_one_has_no_runs(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere is not a folder; give a run folder"):
        load_runs(tmp_path / "nowhere")
    write_run(tmp_path, FakeRun(".being_written"))
    (tmp_path / "no_run").mkdir()
    runs = load_runs(tmp_path)
    assert runs.empty
    assert "state" in runs
    assert find_run_folders(tmp_path) == []


def test_rows_come_with_numbers_and_missing_exact_matches(tmp_path: Path) -> None:
    rows = load_rows(write_run(tmp_path, FakeRun("run", rows=3, exact_match=False)))
    assert list(rows["key"]) == [row_key(0), row_key(1), row_key(2)]
    assert rows["exact_match"].isna().all()
    assert rows["loss_sum"].dtype == float


def test_a_damaged_row_is_named_by_its_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path, FakeRun("run", rows=3))
    path = folder / "evaluation" / "rows.jsonl"
    lines = path.read_text().splitlines()
    write(path, "\n".join([lines[0], lines[1][:40], lines[2]]))
    with pytest.raises(RunFolderError, match=r"rows\.jsonl, line 2, is not a row"):
        load_rows(folder)
    write(path, "\n")
    with pytest.raises(RunFolderError, match="holds no row"):
        load_rows(folder)


def test_history_takes_the_last_line_of_a_step_and_counts_torn_ones(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "train/loss": 3.0}',
        '{"step": 2, "train/loss": 2.0}',
        '{"step": 3, "train/l',  # killed here, and resumed from step 1
        '{"step": 2, "train/loss": 2.5}',
        '{"step": 3, "train/loss": 1.0}',
        '{"step": 3, "eval/loss": 0.9}',
        '{"step": 4, "note": "ä',  # killed again, inside a character
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode()[:-1])
    history = read_history(tmp_path)
    assert list(history["step"]) == [1, 2, 3]
    assert list(history["train/loss"]) == [3.0, 2.5, 1.0]
    assert history["eval/loss"].iloc[2] == 0.9
    assert history.attrs["damaged_lines"] == 2


def test_history_without_a_line_is_empty_and_without_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", "")
    assert read_history(tmp_path).empty
    with pytest.raises(RunFolderError, match="No such file"):
        read_history(tmp_path / "nothing")
