"""What is done about a study that was started: from its folders, and with a scheduler that is not there."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.errors import ConfigError, LaunchError, RunFolderError
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED
from qlora_lab.sweep import chunk, steer, study
from qlora_lab.sweep.chunk import Chunk
from qlora_lab.sweep.journal import Journal
from qlora_lab.sweep.plan import Plan, planned
from qlora_lab.sweep.scheduler import PENDING, RUNNING, STUCK, Ending, Job
from qlora_lab.sweep.slurm.script import comment_of
from qlora_lab.sweep.steer import words
from tests.sweep.eight_runs import NOW, asked, eight_runs, ids, put, record


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return eight_runs(tmp_path)


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


def test_the_first_command_tries_failed_runs_only_as_often_as_their_causes_allow(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One has been interrupted by a full disk once, one twice; one was killed three times without a word."""
    monkeypatch.setattr(study, "launch", lambda plan, launcher: launched.append(plan.to_do(retry_failed=True)))
    launched: list[list[Any]] = []
    full = record(FAILED, message="no space left", cause="disk")
    put(plan, 2, full)
    put(plan, 3, full | {"history": [full]})
    killed = {"state": "running", "cause": "infrastructure", "step": 3}
    put(plan, 5, record(RUNNING) | {"history": [killed, killed]})
    again = planned("bits", [(run.run_id, run.axes, run.config) for run in plan.runs])
    study.run_study(again, "run")
    said = capsys.readouterr().out
    assert "2 failed runs are out of tries (1 disk, 1 TrainingError); mend what they failed for, and" in said
    assert launched == [[again.runs[2], *again.runs[6:]]]
    assert plan.runs[5].folder(plan.runs_dir).state() == FAILED, "it is not tried a fourth time"
    steer.steer(asked(plan, "retry"))
    assert {run.run_id for run in launched[1]} == ids(plan, 2, 3, 4, 5)
    said = capsys.readouterr().out
    assert "3 failed runs are out of tries (1 disk, 1 TrainingError, 1 infrastructure), and tried again all the" in said


def test_a_run_that_was_interrupted_once_too_often_is_failed_and_retry_takes_it(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its time limit came four times at the same step, and its attempts recorded that themselves."""
    launched: list[set[str]] = []

    def launch(plan: Any, launcher: Any) -> None:
        launched.append({run.run_id for run in plan.to_do(retry_failed=True)})

    monkeypatch.setattr(study, "launch", launch)
    monkeypatch.setattr(study, "_answer", lambda plan, record: None)
    late = record(INTERRUPTED, message="told to stop", cause="time_limit") | {"step": 7}
    put(plan, 5, late | {"history": [late] * 3})
    folder = plan.runs[5].folder(plan.runs_dir)
    steer.steer(asked(plan, "status"))
    said = capsys.readouterr().out
    assert "4 failed, 2 finished, 2 new" in said and "4 failed runs are out of tries (2 nan, 1 TrainingError, 1" in said
    assert (folder.status() or {})["state"] == INTERRUPTED, "a look changes nothing"
    steer.steer(asked(plan, "retry", cause="time_limit"))
    steer.steer(asked(plan, "resume"))
    assert launched == [ids(plan, 5), ids(plan, 6, 7)]
    status = folder.status() or {}
    assert (status["state"], status["cause"], len(status["history"])) == (FAILED, "time_limit", 3)
    assert "is out of tries" in status["error"]["message"]


def test_axes_and_options_come_in_any_order() -> None:
    given = words(["hold", "bits", "--runs-dir", "elsewhere", "seed=2", "--json", "quant=nf4,none"])
    assert given == words(["hold", "bits", "seed=2", "quant=nf4,none", "--json", "--runs-dir", "elsewhere"])
    assert given.where == {"seed": ["2"], "quant": ["nf4", "none"]} and given.as_json


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

    keeps_books = False

    def query(self) -> list[Job]:
        self.asked += 1
        return [
            Job("41", (1, 2), PENDING, "PENDING", comment_of("aaaa")),
            Job("41", (3,), RUNNING, "RUNNING", comment_of("aaaa")),
            Job("41", (0,), "ended", "COMPLETED", comment_of("aaaa")),
            Job("42", (0, 1, 2, 3), PENDING, "PENDING", comment_of("bbbb")),
            Job("50", None, RUNNING, "RUNNING", "somebody else's"),
        ]

    def submit(self, script: str, *, keep_open: Sequence[int] = ()) -> str:
        raise AssertionError("nothing is submitted")

    def endings(self, ids: Sequence[str]) -> dict[str, list[Ending]]:
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


def test_a_status_says_why_jobs_do_not_start_and_nobody_waits_for_those_that_never_will(
    plan: Plan, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    never = [Job("41", (1,), STUCK, "PENDING", comment_of("aaaa"), reason="launch failed requeued held")]
    waiting = [
        Job("41", (2, 3), PENDING, "PENDING", comment_of("aaaa"), reason="QOSMaxWallDurationPerJobLimit"),
        Job("42", (0,), PENDING, "PENDING", comment_of("bbbb"), reason="Dependency"),
        Job("42", (1,), PENDING, "PENDING", comment_of("bbbb")),
    ]
    queues = [[*never, *waiting], never]
    monkeypatch.setattr(FakeScheduler, "query", lambda self: queues.pop(0))
    monkeypatch.setattr(steer.time, "sleep", lambda seconds: None)
    steer.steer(asked(plan, "watch"))
    first, _, second = capsys.readouterr().out.partition("jobs: ")[2].partition("jobs: ")
    assert first.startswith("4 pending (2 QOSMaxWallDurationPerJobLimit, 1 Dependency), 1 stuck (1 launch failed reque")
    assert second.startswith("1 stuck (1 launch failed requeued held)")
    assert "3 runs are left, and nothing in the queue executes them" in second
    queues.append([*never, *waiting])
    steer.steer(asked(plan, "status", as_json=True))
    told = json.loads(capsys.readouterr().out)
    assert told["jobs"] == {"stuck": 1, "pending": 4}
    assert told["reasons"]["pending"] == {"QOSMaxWallDurationPerJobLimit": 2, "Dependency": 1}


def test_a_submission_is_read_once_for_all_its_jobs(
    plan: Plan, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM has a line for each task that runs, and a submission may be of 10,000 runs."""
    lines = [Job("41", (task,), RUNNING, "RUNNING", comment_of("aaaa")) for task in range(4)]
    lines += [Job("42", (task,), RUNNING, "RUNNING", comment_of("bbbb")) for task in range(4)]
    read: list[Path] = []
    real = chunk.read_json
    monkeypatch.setattr(chunk, "read_json", lambda file: read.append(file) or real(file))
    monkeypatch.setattr(FakeScheduler, "query", lambda self: lines)
    steer.steer(asked(plan, "status"))
    assert "jobs: 8 running" in capsys.readouterr().out and sorted(file.stem for file in read) == ["aaaa", "bbbb"]


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


def test_a_status_is_told_without_a_scheduler_that_answers(
    plan: Plan, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: FakeScheduler) -> list[Job]:
        raise LaunchError("squeue is not on this machine")

    monkeypatch.setattr(FakeScheduler, "query", refuse)
    steer.steer(asked(plan, "status"))
    said = capsys.readouterr().out
    assert "study bits: 8 runs: " in said and "jobs: not known, squeue is not on this machine" in said


def test_watching_ends_where_nothing_executes_what_is_left(
    plan: Plan, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queues = [scheduler.query(), []]
    for index in range(8):
        put(plan, index, record(FINISHED if index < 6 else INTERRUPTED))
    monkeypatch.setattr(FakeScheduler, "query", lambda self: queues.pop(0))
    monkeypatch.setattr(steer.time, "sleep", lambda seconds: None)
    steer.steer(asked(plan, "watch"))
    assert not queues
    assert "2 runs are left, and nothing in the queue executes them; `resume` or `retry`" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["resume", "retry"])
def test_what_is_executed_again_is_told_to_programs(
    plan: Plan,
    scheduler: FakeScheduler,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in range(8):
        put(plan, index, record(FINISHED if index < 6 else INTERRUPTED if index == 6 else FAILED))
    monkeypatch.setattr(FakeScheduler, "query", lambda self: [])
    monkeypatch.setattr(study, "execute", lambda plan, record: print("words for people"))
    steer.steer(asked(plan, action, as_json=True))
    said = capsys.readouterr()
    assert json.loads(said.out) == {"runs": [plan.runs[6 if action == "resume" else 7].run_id]}
    assert said.err == "words for people\n"


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
    monkeypatch.setattr(FakeScheduler, "endings", lambda self, ids: {"43_0": [Ending("FAILED", 5, 0, "gpu07")]})
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
