"""How a study stands, and what is done about it: from run folders, and from a scheduler that is not there."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.errors import ConfigError, LaunchError, RunFolderError
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW
from qlora_lab.sweep import steer, study
from qlora_lab.sweep.chunk import Chunk
from qlora_lab.sweep.forecast import forecast, waiting
from qlora_lab.sweep.journal import Journal
from qlora_lab.sweep.plan import Plan, make_plan, planned
from qlora_lab.sweep.scheduler import PENDING, RUNNING, Ending, Job
from qlora_lab.sweep.site import Submission
from qlora_lab.sweep.status import duration, find_study, states_of, study_status
from qlora_lab.sweep.steer import Asked, words
from tests.helpers import tiny

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
FINISHED_EARLIER = NOW - timedelta(hours=3)


def record(state: str, ended: datetime = NOW, message: str = "", cause: str | None = None) -> dict[str, Any]:
    error = {"type": "TrainingError", "message": message, "traceback": f"Traceback\n\n  at line 1\n{message}"}
    return {
        "state": state,
        "started_at": (ended - timedelta(minutes=10)).isoformat(timespec="seconds"),
        "ended_at": ended.isoformat(timespec="seconds"),
        "elapsed_s": 600.0,
        "attempt": 1,
        "cause": cause,
        "error": error if message else None,
    }


def put(plan: Plan, index: int, status: dict[str, Any], **files: str) -> None:
    folder = plan.runs_dir / plan.runs[index].run_id
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(json.dumps(status))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Eight runs: two finished, three failed for two reasons, one interrupted, two new."""
    points = [({"quant": quant, "seed": str(seed)}, seed) for quant in ("none", "nf4") for seed in range(4)]
    fixed = ("study.name=bits", "trainer.device=cpu")
    base = {quant: tiny(tmp_path, f"quant={quant}", *fixed) for quant in ("none", "nf4")}
    plan = make_plan("bits", [(point, replace(base[point["quant"]], seed=seed)) for point, seed in points])
    plan.write()
    put(plan, 0, record(FINISHED, NOW - timedelta(minutes=30)))
    put(plan, 1, record(FINISHED, FINISHED_EARLIER))
    put(plan, 2, record(FAILED, message="the loss is not finite at step 17", cause="nan"))
    put(plan, 3, record(FAILED, message="the loss is not finite at step 4", cause="nan"))
    put(plan, 4, record(FAILED, message="no space left"))
    put(plan, 5, record(INTERRUPTED))
    return plan


def ids(plan: Plan, *indices: int) -> set[str]:
    return {plan.runs[index].run_id for index in indices}


def asked(plan: Plan, action: str, **more: Any) -> Asked:
    return Asked(action, plan.runs_dir, "bits", **more)


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
    text = status.text()
    assert "study bits: 8 runs: 3 failed, 2 finished, 2 new, 1 interrupted" in text
    assert "  quant=none: 2 finished, 2 failed" in text
    assert "2 failed (nan): the loss is not finite at step 17" in text
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["status", "bitz"], "no study 'bitz' was started with its runs in .*; there are bits; did you mean 'bits'"),
        (["status", "bits", "qant=nf4"], "'qant' is no axis of this study; its axes are quant, seed; did you mean"),
        (["status", "bits", "quant=nf5"], "quant must be one of none, nf4; got 'nf5'"),
        (["logs", "bits", "--run", "zz"], "no run of this study begins with 'zz'"),
        (["retry", "bits", "--cause", "disk"], r"for the cause 'disk'; the causes are: nan \(2\), TrainingError \(1\)"),
        (["cancel", "bits"], "was planned for launcher=local, which has no queue"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(
    plan: Plan, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        steer.main([*arguments, "--runs-dir", str(plan.runs_dir)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises((ConfigError, RunFolderError, LaunchError), match=sentence):
        steer.steer(words([*arguments, "--runs-dir", str(plan.runs_dir)]))


@pytest.mark.parametrize(
    ("action", "more", "executed"),
    [
        ("resume", {}, (5, 6, 7)),
        ("resume", {"where": {"seed": ["2", "0"]}}, (6,)),
        ("retry", {}, (2, 3, 4)),
        ("retry", {"cause": "nan"}, (2, 3)),
        ("retry", {"where": {"quant": ["nf4"]}}, (4,)),
    ],
)
def test_resume_and_retry_execute_their_part(
    plan: Plan, action: str, more: dict[str, Any], executed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Plan] = []
    monkeypatch.setattr(study, "launch", lambda plan, launcher: launched.append(plan))
    monkeypatch.setattr(study, "_answer", lambda plan, record: None)
    steer.steer(asked(plan, action, **more))
    (found,) = launched
    assert {run.run_id for run in found.to_do(retry_failed=False)} == ids(plan, *executed)
    assert found.folder == plan.folder and found.runs[0].config == plan.runs[0].config
    assert (plan.runs_dir / plan.runs[executed[0]].run_id / "config.yaml").exists()


class FakeScheduler:
    """A queue with an array of four runs, and a pool of four workers for the other four."""

    def __init__(self, plan: Plan) -> None:
        self.told: list[tuple[str, list[str]]] = []
        self.asked = 0
        chunks = plan.folder / "slurm" / "chunks"
        chunks.mkdir(parents=True)
        run_ids = [run.run_id for run in plan.runs]
        for nonce, mode, runs in (("aaaa", "array", run_ids[:4]), ("bbbb", "pool", run_ids[4:])):
            (chunks / f"{nonce}.json").write_text(json.dumps({"mode": mode, "run_ids": runs}))

    def query(self) -> list[Job]:
        self.asked += 1
        return [
            Job("41", (1, 2), PENDING, "PENDING", "qlora_lab/aaaa"),
            Job("41", (3,), RUNNING, "RUNNING", "qlora_lab/aaaa"),
            Job("41", (0,), "ended", "COMPLETED", "qlora_lab/aaaa"),
            Job("42", (0, 1, 2, 3), PENDING, "PENDING", "qlora_lab/bbbb"),
            Job("50", None, RUNNING, "RUNNING", "somebody else's"),
        ]

    def submit(self, script: str, *, keep_open: Sequence[int] = ()) -> str:
        raise AssertionError("nothing is submitted")

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        return {}

    def cancel(self, ids: Sequence[str]) -> None:
        self.told.append(("cancel", list(ids)))

    def hold(self, ids: Sequence[str]) -> None:
        self.told.append(("hold", list(ids)))

    def release(self, ids: Sequence[str]) -> None:
        self.told.append(("release", list(ids)))


@pytest.fixture
def scheduler(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> FakeScheduler:
    fake = FakeScheduler(plan)
    monkeypatch.setitem(steer.SCHEDULERS, "local", lambda: fake)
    return fake


@pytest.mark.parametrize(
    ("action", "where", "told"),
    [
        ("cancel", {}, [("cancel", ["41_1", "41_2", "41_3", "42_0", "42_1", "42_2", "42_3"])]),
        ("hold", {"quant": ["none"], "seed": ["2", "3"]}, [("hold", ["41_2", "41_3"])]),
        ("release", {"quant": ["nf4"]}, [("release", ["42_0", "42_1", "42_2", "42_3"])]),
        ("cancel", {"quant": ["none"], "seed": ["0"]}, []),  # its job is over
    ],
)
def test_jobs_are_told_of_the_runs_that_are_meant(
    plan: Plan, scheduler: FakeScheduler, action: str, where: dict[str, list[str]], told: list[Any]
) -> None:
    steer.steer(asked(plan, action, where=where))
    assert scheduler.told == told


def test_a_pool_cannot_be_cancelled_for_some_of_its_runs(plan: Plan, scheduler: FakeScheduler) -> None:
    with pytest.raises(LaunchError, match=r"job 42 takes other runs of this study too.*leave out quant, seed"):
        steer.steer(asked(plan, "cancel", where={"quant": ["nf4"], "seed": ["0"]}))
    assert not scheduler.told


def test_a_status_counts_the_jobs_in_the_queue(
    plan: Plan, scheduler: FakeScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    steer.steer(asked(plan, "status"))
    assert "jobs: 6 pending, 1 running" in capsys.readouterr().out
    assert scheduler.asked == 1, "for any number of runs"


def test_watching_ends_when_no_run_is_left_to_wait_for(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []

    def go_on(seconds: float) -> None:
        """Let another run that is left finish."""
        put(plan, 5 + len(waited), record(FINISHED))
        waited.append(seconds)

    monkeypatch.setattr(steer.time, "sleep", go_on)
    steer.steer(asked(plan, "watch"))
    said = capsys.readouterr().out
    assert waited == [steer.WATCH_S] * 3
    assert said.count("study bits: 8 runs: ") == 4 and "study bits: 8 runs: 5 finished, 3 failed" in said


@pytest.mark.parametrize("action", ["cancel", "hold", "release", "logs", "clean", "watch"])
def test_every_command_tells_programs(
    plan: Plan, scheduler: FakeScheduler, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(8):
        put(plan, index, record(FINISHED))
    steer.steer(asked(plan, action, as_json=True))
    assert json.loads(capsys.readouterr().out)


def test_a_job_that_never_began_its_run_is_seen_and_tried_again(
    plan: Plan, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its node did not see the folder of the runs."""
    array = Chunk(
        folder=(plan.folder / "slurm").resolve(),
        runs_dir=plan.runs_dir,
        nonce="cccc",
        mode="array",
        run_ids=[plan.runs[6].run_id],
        attempts=[0],
        tasks=1,
        per_gpu=1,
        limit_s=None,
        resources=None,
        generation="1",
        max_failures=3,
        commit=None,
    )
    array.write()
    Journal(plan.folder / "slurm").append("submitted", "cccc", job="43", mode="array")
    monkeypatch.setattr(FakeScheduler, "endings", lambda self, ids: {"43_0": Ending("FAILED", 5, 0, "gpu07")})
    launched: list[Plan] = []
    monkeypatch.setattr(study, "launch", lambda plan, launcher: launched.append(plan))
    monkeypatch.setattr(study, "_answer", lambda plan, record: None)
    steer.steer(asked(plan, "status"))
    assert "1 failed (store): job 43_0 ended on gpu07 before the run began" in capsys.readouterr().out
    steer.steer(asked(plan, "retry", cause="store"))
    (found,) = launched
    assert [run.run_id for run in found.to_do(retry_failed=False)] == [plan.runs[6].run_id]


def test_logs_are_those_of_the_last_failure_or_of_the_run_asked_for(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(plan, 4, record(FAILED, NOW + timedelta(hours=1), message="no space left"))
    steer.steer(asked(plan, "logs"))
    said = capsys.readouterr().out
    assert f"run {plan.runs[4].run_id}: failed (TrainingError)" in said and "no space left" in said
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {n}\n" for n in range(1000)))
    put(plan, 5, record(INTERRUPTED) | {"log": str(log)})
    steer.steer(asked(plan, "logs", run=plan.runs[5].run_id[:8]))
    said = capsys.readouterr().out
    assert "line 999" in said and "line 960" in said and "line 100\n" not in said


def test_clean_removes_checkpoints_of_finished_runs_only(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    for index in (0, 5):
        folder = plan.runs_dir / plan.runs[index].run_id
        (folder / "checkpoints" / "step-1").mkdir(parents=True)
        (folder / "checkpoints" / "step-1" / "weights").write_bytes(b"0" * 5000)
        (folder / "adapter").mkdir()
    steer.steer(asked(plan, "clean", as_json=True))
    assert json.loads(capsys.readouterr().out) == {"runs": 1, "freed_bytes": 5000}
    finished, interrupted = (plan.runs_dir / plan.runs[index].run_id for index in (0, 5))
    assert not (finished / "checkpoints").exists() and (finished / "adapter").exists()
    assert (interrupted / "checkpoints" / "step-1" / "weights").exists()


def test_a_forecast_goes_by_runs_of_the_same_shape(plan: Plan) -> None:
    again = planned("bits", [(run.run_id, run.axes, run.config) for run in plan.runs])
    left = waiting(again, retry_failed=True)
    assert [run.run_id for run in left] == [run.run_id for run in plan.runs[2:]]
    assert len(waiting(again, retry_failed=False)) == 3
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
