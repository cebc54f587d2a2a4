"""A W&B project gives the runs that were synced into it: the same cells as the files they came from."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis.load import load_history, load_runs
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.runs.mirror import STEP
from tests.mirrored_runs import mirrored, standing
from tests.wandb_stand_in import WandbStandIn


def test_a_synced_project_is_what_was_offline(tmp_path: Path, wandb_server: WandbStandIn) -> None:
    for number, state in enumerate(("finished", "failed", "finished")):
        lines = [{STEP: step, "train/loss": 1 / (step + number + 1), "time_s": step / 7} for step in range(1, 40)]
        mirrored(tmp_path, f"run{number}", lines, standing(state, **{"eval/loss": number + 0.1}), seed=number, group={})
    sync = [sys.executable, "-m", "wandb", "sync", "--yes", str(tmp_path / "wandb")]
    subprocess.run(sync, cwd=tmp_path, check=True, capture_output=True, timeout=240)  # it leaves logs in ./wandb
    offline, online = (load_runs(place, cache=tmp_path / "kept") for place in (tmp_path / "wandb", "wandb://team/p"))
    assert sorted(online["state"]) == ["failed", "finished", "finished"]
    pd.testing.assert_frame_equal(by_id(online), by_id(offline), check_like=True, check_exact=True)
    curves = [load_history(place, cache=tmp_path / "kept") for place in (tmp_path / "wandb", "wandb://team/p")]
    pd.testing.assert_frame_equal(
        *(curve.sort_values(["run_id", "step"], ignore_index=True) for curve in curves), check_exact=True
    )


def by_id(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.set_index("run_id").sort_index().drop(columns="folder")


def test_curves_are_asked_for_once(tmp_path: Path, wandb_server: WandbStandIn) -> None:
    for number in range(3):
        run = wandb_server.run("team", "p", f"run{number}")
        run.state, run.history = "finished", [{"_step": step, STEP: step, "loss": step / 3} for step in range(5)]
    first = load_history("wandb://team/p", cache=tmp_path)
    assert len(first) == 15 and wandb_server.operations.count("HistoryPage") == 3
    pd.testing.assert_frame_equal(load_history("wandb://team/p", cache=tmp_path), first)
    assert wandb_server.operations.count("HistoryPage") == 3
    run.history.append({"_step": 5, STEP: 5, "loss": 9.0})
    run.heartbeat += 1
    assert len(load_history("wandb://team/p", cache=tmp_path)) == 16
    assert wandb_server.operations.count("HistoryPage") == 4


def test_a_summary_that_was_edited_later_is_read(tmp_path: Path, wandb_server: WandbStandIn) -> None:
    run = wandb_server.run("team", "p", "run")
    run.state, run.summary = "finished", standing("finished", **{"eval/loss": 0.5})
    assert load_runs("wandb://team/p", cache=tmp_path)["eval/loss"].tolist() == [0.5]
    run.summary["eval/loss"] = 0.25
    assert load_runs("wandb://team/p", cache=tmp_path)["eval/loss"].tolist() == [0.25]


def test_what_is_not_finite_is_missing_however_the_server_spells_it(tmp_path: Path, wandb_server: WandbStandIn) -> None:
    run = wandb_server.run("team", "p", "run")
    run.state, run.summary = "finished", standing("finished") | {"eval/loss": "NaN"}
    values = [0.5, "NaN", "Infinity", "-Infinity"]
    run.history = [{"_step": step, STEP: step, "loss": value} for step, value in enumerate(values)]
    runs = load_runs("wandb://team/p", cache=tmp_path)
    assert runs["state"].tolist() == ["finished"] and runs["eval/loss"].isna().all()
    losses = load_history("wandb://team/p", cache=tmp_path)["loss"]
    assert losses.dtype == float and losses.notna().tolist() == [True, False, False, False]


def test_pages_are_put_together(tmp_path: Path, wandb_server: WandbStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.sources.wandb_project.PER_PAGE", 2)
    for number in range(5):
        wandb_server.run("team", "p", f"run{number}").state = "running"
    runs = load_runs("wandb://team/p", cache=False)
    assert list(runs["run_id"]) == [f"run{number}" for number in range(5)]
    assert wandb_server.operations.count("Runs") == 3
    assert set(runs["state"]) == {"not_started"}, "a run that never said how it stands"


def test_what_cannot_be_read_is_said_in_one_sentence(wandb_server: WandbStandIn) -> None:
    with pytest.raises(RunFolderError, match=r"^wandb://team/nothing cannot be read from W&B \(.*check the name"):
        load_runs("wandb://team/nothing")
    with pytest.raises(ConfigError, match="given as wandb://ENTITY/PROJECT; got 'wandb://team'"):
        load_runs("wandb://team")
    wandb_server.faults.status = 403
    with pytest.raises(RunFolderError, match="cannot be read from W&B"):
        load_runs("wandb://team/p")


def test_a_server_that_does_not_answer_is_given_up(wandb_server: WandbStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_server.run("team", "p", "run")
    monkeypatch.setattr("analysis.sources.wandb_project.TIMEOUT_S", 1)
    wandb_server.faults.drop = True
    with pytest.raises(
        RunFolderError, match=r"cannot be read from W&B .* check the name, WANDB_API_KEY and the network"
    ):
        load_runs(["wandb://team/p"], cache=False)
