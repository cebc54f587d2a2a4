"""A study as a W&B report: what is built comes back the same, and what is saved is what was built."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

wr = pytest.importorskip("wandb_workspaces.reports.v2", reason="wandb-workspaces is not installed")

from analysis.report.__main__ import main  # noqa: E402
from analysis.report.study_report import Study, read_study  # noqa: E402
from analysis.report.wandb_report import MOST_ARMS, MOST_PAIRS, build_report, save_report  # noqa: E402
from qlora_lab.errors import ConfigError, RunFolderError  # noqa: E402
from tests.analysis.study_folders import FakeRun, two_arms, write_study  # noqa: E402
from tests.mirrored_runs import standing  # noqa: E402
from tests.wandb_stand_in import KEY, WandbStandIn, wandb_stand_in  # noqa: E402


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbStandIn]:
    with wandb_stand_in() as stand_in:
        monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
        monkeypatch.setattr("wandb_workspaces.reports.v2.interface._api", None, raising=False)
        yield stand_in


def study_of(tmp_path: Path, *more: FakeRun) -> Study:
    runs = [*two_arms(), *more]
    return read_study(write_study(tmp_path, runs), tmp_path)


def specification(report: Any) -> dict[str, Any]:
    return json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def test_what_is_built_offline_comes_back_the_same(tmp_path: Path) -> None:
    study = study_of(tmp_path, FakeRun("bad", "procedural_clean_128", 2, "failed"))
    report = build_report(study, entity="team", offline=True)
    spec = specification(report)
    again = wr.Report._from_model(report._to_model())
    again.width = report.width  # which wandb-workspaces does not read
    assert specification(again) == spec
    text = json.dumps(spec)
    assert study.answer.sentence in text
    assert "TrainingError: the loss is not finite at step 12" in text
    assert "4 of 5 runs are counted" in text
    kinds = [panel["viewType"] for grid in grids(spec) for panel in panels(grid)]
    assert kinds == [
        "Run History Line Plot",
        "Bar Chart",
        "Parallel Coordinates Plot",
        "Scatter Plot",
        "Parameter Importance",
        "Run Comparer",
    ]


def test_a_run_set_is_the_counted_runs_of_an_arm_grouped_to_one_line(tmp_path: Path) -> None:
    study = study_of(tmp_path, FakeRun("bad", "procedural_clean_128", 2, "failed"))
    arms, everything, _ = grids(specification(build_report(study, entity="team", offline=True)))
    sets = arms["metadata"]["runSets"]
    assert [its["name"] for its in sets] == study.answer.arms
    assert ["clean0" in json.dumps(its["filters"]) for its in sets] == [True, False]
    assert "bad" not in json.dumps(sets[0]["filters"])
    assert all(its["grouping"] == [{"section": "run", "name": "group"}] for its in sets)
    assert "bad" in json.dumps(everything["metadata"]["runSets"][0]["filters"])
    assert [column["accessor"] for column in panels(everything)[0]["config"]["columns"]] == [
        "config:data.value.name",
        "summary:eval/loss",
    ]


def test_a_study_of_many_arms_has_run_sets_of_the_best(tmp_path: Path) -> None:
    runs = [FakeRun(f"run{n:03}", f"arm{n:03}", mean_loss=0.4 + 0.01 * n, rows=4) for n in range(MOST_ARMS + 3)]
    study = read_study(write_study(tmp_path, runs), tmp_path)
    report = build_report(study, entity="team", offline=True)
    arms, _, compared = grids(specification(report))
    assert [its["name"] for its in arms["metadata"]["runSets"]] == study.answer.arms[:MOST_ARMS]
    assert json.dumps(compared).count('"run0') == 10
    assert f"The best {MOST_ARMS} of {len(runs)} arms" in json.dumps(specification(report))


def test_pairs_of_an_axis_that_are_left_out_are_counted(tmp_path: Path) -> None:
    count = MOST_PAIRS + 3
    runs = [
        FakeRun(f"{quant}{n}", seed=0, mean_loss=0.4 + 0.01 * n, rows=4, axes={"data": f"d{n}", "quant": quant})
        for n in range(count)
        for quant in ("nf4", "fp4")
    ]
    study = read_study(write_study(tmp_path, runs), tmp_path)
    assert study.answer.by_axis[0].axis.name == "data"
    text = json.dumps(specification(build_report(study, entity="team", offline=True)))
    assert text.count("pairs more, in the HTML report") == 1
    assert f"And {count - 1 - MOST_PAIRS} pairs more, in the HTML report of this study." in text


def test_a_report_is_saved_as_a_draft_unless_it_is_published(
    tmp_path: Path, server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    server.run("team", "studies", "clean0")
    study = write_study(tmp_path, [replace(run, config={"tracking": {"project": "studies"}}) for run in two_arms()])
    assert main([str(study), "--target", "wandb"]) == 0
    assert main([str(study), "--target", "wandb", "--publish", "--entity", "team", "--project", "studies"]) == 0
    assert [view["type"] for view in server.views] == ["runs/draft", "runs"]
    assert capsys.readouterr().out.count("/team/studies/reports/") == 2
    saved = json.loads(server.views[0]["spec"])
    assert {its["project"]["entityName"] for grid in grids(saved) for its in grid["metadata"]["runSets"]} == {"team"}


def test_the_report_of_a_project_is_put_into_it(tmp_path: Path, server: WandbStandIn) -> None:
    run = server.run("team", "others", "run")
    run.config, run.summary = '{"seed": {"value": 0}}', standing("finished", **{"eval/loss": 0.5})
    file = tmp_path / "report.json"
    assert main(["wandb://team/others", "--target", "wandb", "--save", str(file)]) == 0
    told = json.loads(file.read_text())
    assert (told["entity"], told["project"]) == ("team", "others")


def test_a_project_that_is_not_there_is_named(tmp_path: Path, server: WandbStandIn) -> None:
    report = build_report(study_of(tmp_path), entity="team", project="nowhere")
    with pytest.raises(RunFolderError, match=r"could not be saved in team/nowhere .*sync the runs first"):
        save_report(report)
    assert not server.views


def test_a_study_without_a_finished_run_has_no_report(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, [FakeRun("a", state="failed")]), tmp_path)
    with pytest.raises(ConfigError, match="nothing to compare"):
        build_report(study, offline=True)


def test_the_command_writes_the_specification_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    study = write_study(tmp_path, [replace(run, data=run.data + "|<b>") for run in two_arms()])
    file = tmp_path / "report.json"
    assert main([str(study), "--target", "wandb", "--save", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    told = json.loads(file.read_text())
    assert told["project"] == "qlora_lab"
    tables = [block["content"] for block in told["spec"]["blocks"] if block["type"] == "markdown-block"]
    assert r"procedural_clean_128\|&lt;b&gt;" in "".join("".join(table) for table in tables)


def grids(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [block for block in spec["blocks"] if block["type"] == "panel-grid"]


def panels(grid: dict[str, Any]) -> list[dict[str, Any]]:
    return grid["metadata"]["panelBankSectionConfig"]["panels"]
