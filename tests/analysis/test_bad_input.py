"""Runs that are not what they should be: named, counted, left out or kept by a rule, never averaged in silently."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.load import load_history, load_runs
from analysis.report.study_report import read_runs, summarize, summarize_study
from analysis.study.answer import Answer, compare
from analysis.study.arms import arms_of_runs, varying_axes
from analysis.study.audit import audit, what_is_missing
from qlora_lab.errors import ConfigError
from tests.analysis.study_folders import two_arms, write, write_run, write_study


def answered(runs_dir: Path) -> Answer:
    runs = load_runs(runs_dir, cache=False)
    return compare(runs, ["data", "seed"], "eval/loss", "min", arms=arms_of_runs(runs, ["data"]), draws=50)


def test_a_half_written_folder_is_named_and_in_no_mean(tmp_path: Path) -> None:
    folder = write_study(tmp_path, two_arms())
    torn = tmp_path / "clean1" / "result.json"
    write(torn, torn.read_text()[:100])
    answer = summarize_study(folder, tmp_path)
    assert answer.not_counted["run_id"].tolist() == ["clean1"]
    row = answer.table.set_index("arm").loc["procedural_clean_128"]
    assert (row["n"], row["planned"], row["not counted"]) == (1, 2, "1 unreadable")
    assert row["eval/loss mean"] == load_runs(tmp_path / "clean0")["eval/loss"].iloc[0]
    said = " ".join(answer.text.split())
    assert "result.json cannot be read as JSON" in said and "1 of 2" in said
    for name in ("table.md", "table.csv", "table.tex", "report.html"):
        assert "1 unreadable" in (folder / name).read_text()


def test_runs_of_an_older_schema_are_kept_as_they_are_and_named(tmp_path: Path) -> None:
    for run in two_arms():
        config = yaml.safe_load((write_run(tmp_path, run) / "config.yaml").read_text())
        config["adapter"]["dropout"] = 0.1
        if run.run_id == "clean1":
            del config["adapter"]["dropout"], config["quant"]
        write(tmp_path / run.run_id / "config.yaml", yaml.safe_dump(config))
    runs = load_runs(tmp_path, cache=False)
    (note,) = audit(runs, "eval/loss")
    assert note.startswith("1 run is of an older version, without settings that others have (quant.format")
    assert "adapter.dropout): clean1. They are kept" in note
    axes = varying_axes(runs)
    answer = compare(runs, axes, "eval/loss", "min", arms=arms_of_runs(runs, axes), draws=50)
    assert sorted(answer.table["n"]) == [1, 1, 2], "an arm of its own"
    assert note in answer.notes


def test_a_copied_folder_is_not_another_seed(tmp_path: Path) -> None:
    for run in two_arms():
        write_run(tmp_path, run)
    alone = answered(tmp_path).table
    shutil.copytree(tmp_path / "clean0", tmp_path / "backup of clean0")
    answer = answered(tmp_path)
    pd.testing.assert_frame_equal(answer.table, alone)
    (note,) = [note for note in answer.notes if "several places" in note]
    assert note.startswith("1 run is in several places, and counted once")
    assert f"clean0 from {tmp_path}/clean0, not from {tmp_path}/backup of clean0" in note


def test_a_metric_of_two_names_is_two_metrics_until_somebody_says_so(tmp_path: Path) -> None:
    for run in two_arms():
        write_run(tmp_path, run)
    result = tmp_path / "clean1" / "result.json"
    write(result, result.read_text().replace('"eval/loss"', '"eval_loss"'))
    answer = answered(tmp_path)
    assert answer.not_counted["run_id"].tolist() == ["clean1"]
    (note,) = [note for note in answer.notes if "two names" in note]
    assert note.startswith("eval/loss (3 runs) and eval_loss (1 runs) look like one metric under two names")
    runs = load_runs(tmp_path, cache=False, aliases={"eval_loss": "eval/loss"})
    assert runs["eval/loss"].notna().all() and "eval_loss" not in runs
    write(result, result.read_text().replace('"eval_loss"', '"eval/loss": 9.0, "eval_loss"'))
    with pytest.raises(ConfigError, match=r"1 rows have both eval_loss and eval/loss, with different values, such as"):
        load_runs(tmp_path, cache=False, aliases={"eval_loss": "eval/loss"})
    curves = load_history(tmp_path, ["loss"], cache=False, aliases={"train/loss": "loss"})
    assert curves["loss"].notna().sum() == 120


def test_studies_that_are_mixed_are_named_and_their_arms_kept_apart(tmp_path: Path) -> None:
    for number, run in enumerate(two_arms()):
        run.config = {"study": {"name": "a" if number < 3 else "b"}}
        write_run(tmp_path, run)
    answer = summarize(read_runs(tmp_path, tmp_path / "out", "eval/loss", "min"))
    (note,) = [note for note in answer.notes if "studies" in note]
    assert note.startswith("Runs of 2 studies are together here: a (3), b (1). All are kept")
    assert not [note for note in audit(answer.runs, "eval/loss", planned=True) if "studies" in note]


def test_what_is_missing_is_said_in_a_few_words() -> None:
    assert (
        what_is_missing(["failed", "not_started", "failed", "finished"]) == "2 failed, 1 not started, 1 without a value"
    )
    assert what_is_missing([]) == ""
