"""A plan is found again by all that it was made of, and made again when any of it has changed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from qlora_lab.sweep import command, study
from qlora_lab.sweep.plan import Plan, make_plan
from qlora_lab.sweep.planned import PlanMemory, command_key
from tests.helpers import TINY, hydra_on_conf, tiny

STUDY = """# @package _global_
study: {question: "why?"}
hydra: {sweeper: {params: {seed: "range(3)", quant: "none,nf4"}}}
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a study of the user's own, and Hydra ready to compose it."""
    folder = tmp_path / "sweeps" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    with hydra_on_conf():
        yield tmp_path


def key(*more: str) -> str | None:
    arguments = [*TINY, "+experiment=mine", *more]
    config = compose("sweep", arguments, return_hydra_config=True)
    return command_key(GlobalHydra.instance().config_loader(), config, arguments)


def run(*more: str) -> None:
    arguments = [*TINY, "+experiment=mine", *more]
    config = compose("sweep", arguments, return_hydra_config=True)
    params: Any = OmegaConf.to_container(config.hydra.sweeper.params)
    command.sweep(GlobalHydra.instance().config_loader(), config, params, arguments)


def test_the_key_tells_apart_what_may_change_a_plan(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    assert before is not None and key() == before
    assert key("sweep.action=plan") == before  # what is done with it
    assert key("sweep.retry_failed=false") != before
    assert key("adapter.rank=3") != before
    monkeypatch.setenv("QLORA_LAB_DATA", "/elsewhere")
    assert key() != before
    monkeypatch.delenv("QLORA_LAB_DATA")
    monkeypatch.setattr("qlora_lab.sweep.planned.code_sha256", lambda: "0")
    assert key() != before
    monkeypatch.undo()
    monkeypatch.chdir(user)
    assert key() == before
    (user / "sweeps" / "experiment" / "mine.yaml").write_text(STUDY + "trainer: {batch_size: 3}\n")
    assert key() != before
    assert key("+hydra.searchpath=[pkg://others]") is None  # files that are not looked at


def test_the_same_command_composes_nothing_again(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: list[Plan] = []
    monkeypatch.setattr(study, "launch", lambda plan, launcher: launched.append(plan))
    monkeypatch.setattr(study, "_answer", lambda plan, record: None)
    run("sweep.action=plan")
    assert not (user / "runs").exists(), "a plan changes nothing"
    run()
    (first,) = launched
    assert len(first.runs) == 6
    for planned_run in first.runs:
        file = user / "runs" / planned_run.run_id / "status.json"
        file.write_text(json.dumps({"state": "finished", "elapsed_s": 1.0}))
    monkeypatch.setattr(command, "Composer", None)
    run()
    run("sweep.action=plan")
    assert launched == [first], "all runs are finished: none is started"
    capsys.readouterr()
    run("sweep.action=status", "sweep.json=true")
    assert json.loads(capsys.readouterr().out)["states"] == {"finished": 6}
    run("sweep.action=status", "quant=nf4")  # no plan of its own: part of the newest
    assert "study mine: 3 runs: 3 finished" in capsys.readouterr().out
    with pytest.raises(TypeError):  # another plan, which would have to be composed
        run("adapter.rank=3")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a", "output": "b"}\n' * 50)
    config = tiny(tmp_path / "runs", "data=file", f"data.source.path={rows}", "data.source.template=input_output")
    return make_plan("study", [({"seed": str(seed)}, replace(config, seed=seed)) for seed in range(2)])


def remembered(plan: Plan) -> PlanMemory:
    memory = PlanMemory(plan.runs_dir, "some key")
    memory.keep(plan, plan.write()["configs"])
    return memory


def test_a_plan_comes_back_with_its_runs_as_they_stand_now(plan: Plan) -> None:
    memory = remembered(plan)
    (plan.runs_dir / plan.runs[1].run_id).mkdir()
    (plan.runs_dir / plan.runs[1].run_id / "status.json").write_text('{"state": "finished"}')
    found = memory.find()
    assert found is not None
    assert [(run.run_id, run.axes, run.config) for run in found.runs] == [
        (run.run_id, run.axes, run.config) for run in plan.runs
    ]
    assert [run.state for run in found.runs] == ["new", "finished"]
    assert PlanMemory(plan.runs_dir, "another key").find() is None
    assert PlanMemory(plan.runs_dir, None).find() is None


def test_a_plan_on_data_that_changed_is_made_again(plan: Plan, tmp_path: Path) -> None:
    memory = remembered(plan)
    assert memory.find() is not None
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "c"}\n' * 60)
    assert memory.find() is None


def test_a_plan_whose_file_is_gone_or_damaged_is_made_again(plan: Plan) -> None:
    memory = remembered(plan)
    (file,) = plan.folder.glob("plan-*.json")
    file.write_text(file.read_text() + " ")
    assert memory.find() is None
    file.unlink()
    assert memory.find() is None
