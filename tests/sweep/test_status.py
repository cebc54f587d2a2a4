"""How a study stands, and what is left of it, from run folders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lab.errors import RunFolderError
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW
from qlora_lab.sweep import steer
from qlora_lab.sweep.forecast import forecast, waiting
from qlora_lab.sweep.plan import Plan, make_plan, planned
from qlora_lab.sweep.site import Submission
from qlora_lab.sweep.status import duration, find_study, states_of, study_status
from qlora_lab.sweep.steer import Asked
from tests.helpers import tiny
from tests.sweep.eight_runs import NOW, asked, eight_runs


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return eight_runs(tmp_path)


def test_a_status_counts_by_state_and_axis_value_and_groups_failures(plan: Plan) -> None:
    found = find_study(plan.runs_dir, "bits")
    status = study_status(found, states_of(found), NOW)
    assert status.states == {FAILED: 3, FINISHED: 2, NEW: 2, INTERRUPTED: 1}
    assert status.values["quant"] == {
        "none": {FINISHED: 2, FAILED: 2},
        "nf4": {FAILED: 1, INTERRUPTED: 1, NEW: 2},
    }
    assert [(each.cause, each.runs) for each in status.failures] == [("nan", 2), ("TrainingError", 1)]
    assert status.failures[0].last_lines[-1] == "the loss is not finite at step 17"
    # one run finished in the last hour, of which the whole was used
    assert status.finished_per_hour == pytest.approx(1.0)
    assert status.time_left_s == pytest.approx(3 * 3600)
    assert status.out_of_tries == {"nan": 2, "TrainingError": 1}
    text = status.text()
    assert "study bits: 8 runs: 3 failed, 2 finished, 2 new, 1 interrupted" in text
    assert "  quant=none: 2 finished, 2 failed" in text
    assert "2 failed (nan): the loss is not finite at step 17" in text
    assert "3 failed runs are out of tries (2 nan, 1 TrainingError); mend the cause, then: " in text
    assert "python -m qlora_lab.sweep retry bits\n" in text
    assert "1.0 runs finish an hour; 3 h 0 min left" in text


def test_a_status_is_for_programs_too(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    steer.main(["status", "bits", "quant=nf4", "--json", "--runs-dir", str(plan.runs_dir)])
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == 4 and told["states"] == {NEW: 2, FAILED: 1, INTERRUPTED: 1}
    assert told["jobs"] is None


def test_the_newest_plan_is_meant_unless_one_is_named(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = planned("bits", [(run.run_id, run.axes, run.config) for run in plan.runs[:2]])
    narrow.write()
    steer.steer(asked(plan, "status"))
    said = capsys.readouterr().out
    assert "study bits: 2 runs: 2 finished" in said and "it has 1 older" in said
    steer.steer(Asked("status", plan.runs_dir, f"bits/{plan.folder.name}"))
    assert "study bits: 8 runs" in capsys.readouterr().out


def test_a_forecast_goes_by_runs_of_the_same_shape(plan: Plan) -> None:
    again = planned("bits", [(run.run_id, run.axes, run.config) for run in plan.runs])
    left = waiting(again, retry_failed=True)
    assert [run.run_id for run in left] == [run.run_id for run in plan.runs[5:]], "what failed is out of tries"
    assert len(waiting(again, retry_failed=False)) == 3
    left = waiting(replace(again, beyond_rules=True), retry_failed=True)
    assert [run.run_id for run in left] == [run.run_id for run in plan.runs[2:]]
    told = forecast(again, left)
    assert (told.runs, told.known) == (6, 2)  # no run with quant=nf4 has finished
    assert told.hours == pytest.approx(2 * 600 / 3600)
    # a folder and a status, as of the runs that finished; the others by what a run with one checkpoint leaves
    assert told.inodes == 2 * 2 + 4 * (6 + 4 + 3 + 1 + 6)
    assert "hours of CPU runs: about 0.33 for 2 of the 6 runs" in told.text()
    short = replace(told, disk_bytes=2 * told.free_bytes).text()
    assert "THAT IS NOT ENOUGH" in short and "NOT ENOUGH" not in told.text()


def test_a_forecast_looks_at_earlier_studies_and_says_what_it_does_not_know(plan: Plan, tmp_path: Path) -> None:
    another = make_plan("other", [({"seed": "9"}, replace(plan.runs[0].config, seed=9))])
    told = forecast(another, another.runs)
    assert told.known == 1 and told.hours == pytest.approx(600 / 3600)
    elsewhere = replace(plan.runs[0].config.paths, runs_dir=str(tmp_path / "empty"))
    lone = make_plan("lone", [({"seed": "9"}, replace(plan.runs[0].config, seed=9, paths=elsewhere))])
    text = forecast(lone, lone.runs).text()
    assert "not known before a run of the same shape has finished" in text
    assert "20 inodes, judged by their configurations" in text
    unpredicted = replace(lone.runs[0], need=None)
    assert "disk: not known" in forecast(lone, [unpredicted]).text()
    assert not (tmp_path / "empty").exists()


def test_a_forecast_does_without_plans_that_it_cannot_read(plan: Plan) -> None:
    old = plan.runs_dir / "studies" / "old" / "0123abcd" / "plan-000000000000.json"
    old.parent.mkdir(parents=True)
    old.write_text("of other code")
    another = make_plan("other", [({"seed": "9"}, replace(plan.runs[0].config, seed=9))])
    assert forecast(another, another.runs).known == 1


def test_a_damaged_status_is_refused_in_one_sentence(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    file = plan.runs_dir / plan.runs[5].run_id / "status.json"
    file.write_text('{"state": "interr')
    with pytest.raises(SystemExit) as end:
        steer.main(["status", "bits", "--runs-dir", str(plan.runs_dir)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and f"{file} is damaged" in said
    with pytest.raises(RunFolderError, match="is damaged"):
        plan.runs[5].folder(plan.runs_dir).state()


def test_what_would_be_submitted_is_said(plan: Plan, tmp_path: Path) -> None:
    slurm = tiny(tmp_path, "launcher=slurm", "launcher.slurm.partition=gpu").launcher
    assert Submission(8, 0, slurm, arrays=2, tasks=8).text() == (
        "would execute 8 runs on SLURM (partition gpu; 1 GPU, 8 CPUs, 64 GB, 4 h 0 min each) in 2 job arrays of "
        "8 tasks together, at most 64 at a time"
    )
    assert Submission(1, 0, tiny(tmp_path, "launcher=in_process").launcher).text().endswith("in this process")
    assert Submission(0, 3, slurm).text() == "nothing is left to execute; 3 wait or run in jobs submitted before"


def test_times_are_said_as_people_do() -> None:
    assert [duration(s) for s in (3, 600, 5400, 200_000)] == ["1 min", "10 min", "1 h 30 min", "2 d 7 h"]
