"""A W&B project gives the runs that were synced into it: the same cells as the files they came from."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.load import load_history, load_runs
from analysis.report.__main__ import main
from analysis.sources import wandb_project
from analysis.sources.wandb_project import OnlineRun
from analysis.sources.wandb_runs import MirroredRun
from analysis.study.audit import audit
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.runs.mirror import STEP
from tests.mirrored_runs import mirrored, standing
from tests.wandb_stand_in import Faults, WandbStandIn


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


def test_only_runs_that_changed_are_asked_for_again(
    tmp_path: Path, wandb_server: WandbStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.sources.wandb_project.PER_PAGE", 2)
    for number in range(5):
        run = wandb_server.run("team", "p", f"run{number}")
        run.state, run.summary = "finished", standing("finished", **{"eval/loss": 0.5})

    def loaded(**how: Any) -> tuple[list[float], int]:
        before = wandb_server.operations.count("Runs")
        losses = load_runs("wandb://team/p", **how)["eval/loss"].tolist()
        return losses, wandb_server.operations.count("Runs") - before

    assert loaded(cache=tmp_path) == ([0.5] * 5, 3), "all of them, two a query"
    assert loaded(cache=tmp_path) == ([0.5] * 5, 0)
    run.summary["eval/loss"] = 0.25
    assert loaded(cache=False) == ([0.5] * 4 + [0.25], 3), "an edit without a sign of life is seen by reading all anew"
    run.heartbeat += 1
    assert loaded(cache=tmp_path) == ([0.5] * 4 + [0.25], 1)
    wandb_server.run("team", "p", "run5").summary = run.summary
    assert loaded(cache=tmp_path) == ([0.5] * 4 + [0.25] * 2, 1)


def test_a_run_that_is_deleted_meanwhile_is_named(
    tmp_path: Path, wandb_server: WandbStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run0", "run1"):
        wandb_server.run("team", "p", name)
    rows = wandb_project.read_rows

    def read_late(runs: Sequence[OnlineRun]) -> dict[str, MirroredRun]:
        del wandb_server.runs["team", "p", "run1"]
        return rows(runs)

    monkeypatch.setattr("analysis.load.read_rows", read_late)
    with pytest.raises(RunFolderError, match=r"^wandb://team/p no longer has run1, deleted while it was read"):
        load_runs("wandb://team/p", cache=tmp_path)


def test_studies_that_are_mixed_in_a_project_are_named(wandb_server: WandbStandIn) -> None:
    for number, study in enumerate(("a", "a", "b")):
        run = wandb_server.run("team", "p", f"run{number}")
        run.state, run.summary = "finished", standing("finished", **{"eval/loss": 0.5})
        run.config = json.dumps({"seed": {"value": number}, "study": {"value": {"name": study}}})
    notes = audit(load_runs("wandb://team/p", cache=False), "eval/loss", planned=False)
    (note,) = [note for note in notes if "studies" in note]
    assert note.startswith("Runs of 2 studies are together here: a (2), b (1). All are kept")


def test_a_project_is_reported_all_of_it_or_one_of_its_studies(
    tmp_path: Path, wandb_server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for study, data, seed in (
        ("a", "clean", 0),
        ("a", "clean", 1),
        ("a", "wrong", 0),
        ("a", "wrong", 1),
        ("b", "x", 0),
    ):
        run = wandb_server.run("team", "p", f"{study}-{data}-{seed}")
        run.state, run.summary = "finished", standing("finished", **{"eval/loss": len(data) + 0.01 * seed})
        run.config = json.dumps(
            {"seed": {"value": seed}, "study": {"value": {"name": study}}, "data": {"value": {"name": data}}}
        )
        run.history = [{"_step": step, STEP: step, "train/loss": 2 / step} for step in range(1, 9)]
    wandb_server.run("team", "p", "killed")
    mixed = "Runs of 2 studies are together here: a (4), b (1)."

    def reported(*options: str) -> tuple[int, str, str]:
        status = main(["wandb://team/p", "--out", str(tmp_path), *options])
        printed = capsys.readouterr()
        page = tmp_path / "report.html"
        html = page.read_text() if page.exists() else ""
        page.unlink(missing_ok=True)
        return status, " ".join((printed.out + printed.err).split()), html

    status, said, html = reported()
    assert status == 0 and mixed in said and mixed in html and "5 of 6 runs are counted" in html
    status, said, html = reported("--study", "a")
    assert status == 0 and mixed not in said
    assert "1 run is of no study that can be read, and left out: killed." in said and "4 of 4 runs are counted" in html
    assert wandb_server.operations.count("HistoryPage") == 5, "the curves are drawn too"
    assert reported("--study", "c") == (2, "error: --study must be one of a, b; got 'c'", "")


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
    assert wandb_server.operations.count("RunsListed") == 3
    assert set(runs["state"]) == {"not_started"}, "a run that never said how it stands"


def test_what_cannot_be_read_is_said_in_one_sentence(wandb_server: WandbStandIn) -> None:
    with pytest.raises(RunFolderError, match=r"^wandb://team/nothing cannot be read from W&B \(.*check the name"):
        load_runs("wandb://team/nothing")
    wandb_server.run("team", "p", "run")
    assert load_runs(["wandb://team/p/run"], cache=False)["run_id"].tolist() == ["run"]
    with pytest.raises(RunFolderError, match=r"^wandb://team/p has no run gone; was it deleted"):
        load_runs(["wandb://team/p/run", "wandb://team/p/gone"])
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


@pytest.mark.parametrize("faults", [Faults(status=500, count=2), Faults(status=429, count=2), Faults(delay_s=0.05)])
def test_a_server_that_stumbles_gives_the_same_runs(wandb_server: WandbStandIn, faults: Faults) -> None:
    for number in range(3):
        run = wandb_server.run("team", "p", f"run{number}")
        run.state, run.summary = "finished", standing("finished", **{"eval/loss": number / 3})
        run.history = [{"_step": step, STEP: step, "loss": step / 3} for step in range(5)]
    expected = load_runs("wandb://team/p", cache=False), load_history("wandb://team/p", cache=False)
    wandb_server.struck, wandb_server.faults = 0, replace(faults)
    runs = load_runs("wandb://team/p", cache=False)
    wandb_server.faults = replace(faults)  # its count is used up
    for found, before in zip((runs, load_history("wandb://team/p", cache=False)), expected, strict=True):
        pd.testing.assert_frame_equal(found, before)
    assert wandb_server.struck >= 2
