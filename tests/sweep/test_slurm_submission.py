"""Submitting to a scheduler that only remembers, so that its answers can be chosen."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.errors import LaunchError
from qlora_lab.runs.causes import CODE, HOST_MEMORY, INFRASTRUCTURE, NODE, STOPPED, TIME_LIMIT
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from qlora_lab.sweep.chunk import Chunk, chunk_file
from qlora_lab.sweep.journal import INTENT, LOST, REFUSED, SUBMITTED, Journal
from qlora_lab.sweep.scheduler import ENDED, PENDING, RUNNING, STUCK, Ending, Job
from qlora_lab.sweep.slurm import submit
from qlora_lab.sweep.slurm.arrays import batches_of, groups_of
from qlora_lab.sweep.slurm.commands import ForgottenError, LimitError, UnreachableError
from qlora_lab.sweep.slurm.endings import cause_of_ending
from qlora_lab.sweep.slurm.limits import SiteLimits
from qlora_lab.sweep.slurm.nodes import bad_nodes
from qlora_lab.sweep.slurm.scheduler import job_of, memory_bytes, task_numbers
from qlora_lab.sweep.slurm.script import comment_of, nonce_of
from qlora_lab.sweep.slurm.task import seconds
from tests.sweep.remembering_scheduler import Scheduler, option, submission


def events(tmp_path: Path) -> list[str]:
    lines = (tmp_path / "slurm" / "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def test_a_canary_gates_an_array(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    outcome = submission(tmp_path, scheduler, max_parallel=2).launch(runs)
    assert outcome.jobs == ["1", "2"] and outcome.submitted == [run.run_id for run in runs]
    canary, rest = scheduler.scripts
    assert option(canary, "array") == "0-0" and "afterok" not in canary
    assert option(rest, "array") == "0-3%2" and option(rest, "dependency") == "afterok:1"
    assert option(rest, "kill-on-invalid-dep") == "yes" and "#SBATCH --requeue" in rest
    assert events(tmp_path) == [INTENT, SUBMITTED] * 2
    again = submission(tmp_path, scheduler).launch(runs)
    assert not again.submitted and len(again.queued) == 5


def test_what_a_dead_launcher_left_is_adopted_or_submitted_anew(tmp_path: Path, runs: list[RunFolder]) -> None:
    """It died between sbatch and its last line, or before sbatch."""
    scheduler = Scheduler()
    submission(tmp_path, scheduler).launch(runs)
    journal = tmp_path / "slurm" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:3]) + '\n{"event": "subm')
    assert not submission(tmp_path, scheduler).launch(runs).submitted
    assert list(Journal(tmp_path / "slurm").entries().values())[-1]["adopted"] is True
    journal.write_text("\n".join(lines[:3]) + "\n")
    scheduler.queue = scheduler.queue[:1]  # sbatch was never called for the second
    outcome = submission(tmp_path, scheduler).launch(runs)
    assert outcome.submitted == [run.run_id for run in runs[1:]] and outcome.queued == [runs[0].run_id]
    assert LOST in events(tmp_path)


def test_a_job_that_was_submitted_twice_is_cancelled_once(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    submission(tmp_path, scheduler).launch(runs[:1])
    scheduler.queue.append(replace(scheduler.queue[0], job="77"))
    submission(tmp_path, scheduler).launch(runs[:1])
    assert scheduler.cancelled == ["77"]


def test_a_job_that_slurm_will_never_start_is_replaced(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    mine = submission(tmp_path, scheduler)
    mine.launch(runs[:2])
    canary, other = scheduler.queue
    scheduler.queue = [replace(canary, state=STUCK), other]
    assert [job.job for job in mine.jobs()] == [other.job]
    outcome = mine.launch(runs[:2])
    assert scheduler.cancelled == [f"{canary.job}_0"]
    assert outcome.submitted == [runs[0].run_id] and outcome.queued == [runs[1].run_id]


def test_an_answer_that_got_lost_is_found_in_the_queue(
    tmp_path: Path, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "BACK_OFF_S", (0.0, 0.0))
    scheduler = Scheduler()
    scheduler.answers = [(UnreachableError("no answer"), False), (UnreachableError("no answer"), True)]
    assert submission(tmp_path, scheduler).launch(runs[:1]).jobs == ["1"]
    assert len(scheduler.scripts) == 1
    scheduler.end()
    scheduler.answers = [(UnreachableError("no answer"), False)] * 3
    with pytest.raises(UnreachableError):
        submission(tmp_path, scheduler).launch(runs[1:2])
    assert submission(tmp_path, scheduler).launch(runs[1:2]).submitted == [runs[1].run_id]


def test_a_canary_that_slurm_has_forgotten_is_submitted_again(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    submit_ = scheduler.submit

    def forget(script: str, *, keep_open: Sequence[int] = ()) -> str:
        if option(script, "array") == "0-0" or len(scheduler.scripts) > 1:
            return submit_(script, keep_open=keep_open)
        scheduler.queue.clear()  # the controller died and came back without the canary
        raise ForgottenError("sbatch refused (Job dependency problem)")

    scheduler.submit = forget  # type: ignore[method-assign]
    outcome = submission(tmp_path, scheduler).launch(runs)
    assert outcome.submitted == [run.run_id for run in runs] and len(scheduler.queue) == 2
    assert events(tmp_path) == [INTENT, SUBMITTED, INTENT, REFUSED, INTENT, SUBMITTED, INTENT, SUBMITTED]


def test_a_refusal_is_recorded_and_raised(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    scheduler.answers = [(LaunchError("sbatch refused (invalid partition)"), False)]
    with pytest.raises(LaunchError, match="invalid partition"):
        submission(tmp_path, scheduler).launch(runs)
    assert events(tmp_path) == [INTENT, REFUSED]


def test_a_limit_that_nobody_told_is_met_with_fewer_workers(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    refusal = LimitError("sbatch refused: Job violates accounting/QOS policy")
    submission(tmp_path, scheduler).launch(runs[:1])
    scheduler.answers = [(refusal, False)]
    with pytest.raises(LimitError):
        submission(tmp_path, scheduler).launch(runs[1:])  # not even the canary
    scheduler = Scheduler()
    mine = submission(tmp_path / "other", scheduler)
    submit_ = scheduler.submit

    def at_most_two(script: str, *, keep_open: Sequence[int] = ()) -> str:
        if option(script, "array") not in ("0-0", "0-1"):
            raise refusal
        return submit_(script, keep_open=keep_open)

    scheduler.submit = at_most_two  # type: ignore[method-assign]
    assert len(mine.launch(runs).submitted) == 5
    assert option(scheduler.scripts[-1], "array") == "0-1"
    nonce = nonce_of(scheduler.queue[-1].comment)
    chunk = Chunk.read(chunk_file(tmp_path / "other" / "slurm", nonce or ""))
    assert chunk.mode == "pool" and len(chunk.run_ids) == 4


@pytest.mark.parametrize(
    ("ending", "cause", "memory"),
    [
        (Ending("NODE_FAIL"), NODE, "64G"),
        (Ending("OUT_OF_MEMORY"), HOST_MEMORY, "96G"),
        (Ending("FAILED", signal=9), INFRASTRUCTURE, "64G"),
        (Ending("CANCELLED"), STOPPED, "64G"),
        (None, INFRASTRUCTURE, "64G"),
    ],
)
def test_a_run_whose_process_died_is_settled_and_submitted_again(
    tmp_path: Path, runs: list[RunFolder], ending: Ending | None, cause: str, memory: str
) -> None:
    runs[0].begin()
    status = json.loads((runs[0].path / "status.json").read_text())
    (runs[0].path / "status.json").write_text(json.dumps(status | {"job": "41_0"}))
    scheduler = Scheduler()
    scheduler.books = {"41_0": ending} if ending is not None else {}
    assert submission(tmp_path, scheduler).launch(runs[:1]).submitted == [runs[0].run_id]
    settled = runs[0].status()
    assert settled is not None and (settled["state"], settled["cause"]) == (INTERRUPTED, cause)
    assert option(scheduler.scripts[0], "mem") == memory


def test_a_run_that_a_job_of_another_study_executes_is_left_alone(tmp_path: Path, runs: list[RunFolder]) -> None:
    """Its lock may be one that this machine does not see."""
    runs[0].begin()
    status = json.loads((runs[0].path / "status.json").read_text()) | {"job": "41_3"}
    (runs[0].path / "status.json").write_text(json.dumps(status))
    scheduler = Scheduler()
    scheduler.queue = [Job("41", (2, 3), RUNNING, "RUNNING", comment_of("of another"))]
    outcome = submission(tmp_path, scheduler).launch(runs[:2])
    assert outcome.queued == [runs[0].run_id] and outcome.submitted == [runs[1].run_id]
    assert runs[0].status() == status


def test_a_run_that_used_up_its_attempts_is_failed(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    for _ in range(3):
        runs[0].begin()
    outcome = submission(tmp_path, scheduler).launch(runs[:1])
    assert outcome.given_up == [runs[0].run_id] and not scheduler.scripts
    assert runs[0].state() == FAILED
    assert submission(tmp_path, scheduler).launch(runs[:1]).submitted, "unless it is asked for as a failed run"


def test_causes_of_endings() -> None:
    gib = 2**30
    outgrown = Ending("FAILED", exit_code=1, peak_memory_bytes=gib - 1000, memory_limit_bytes=gib)
    assert cause_of_ending(outgrown) == HOST_MEMORY
    assert cause_of_ending(Ending("FAILED", exit_code=1, peak_memory_bytes=gib // 2, memory_limit_bytes=gib)) == CODE
    assert cause_of_ending(Ending("TIMEOUT", signal=1)) == TIME_LIMIT
    assert cause_of_ending(Ending("FAILED", signal=53)) == INFRASTRUCTURE
    log = "step 3\nslurmstepd-gpu01: error: Exceeded job memory limit\n"
    assert cause_of_ending(Ending("FAILED", signal=9), log) == HOST_MEMORY
    assert cause_of_ending(Ending("FAILED", signal=9), "no memory limit\n") == INFRASTRUCTURE


def test_batches_keep_to_the_limits() -> None:
    groups = groups_of([SlurmConfig(memory_gb=memory) for memory in [1, 2] * 6])
    given = {"max_array": 4, "pool": False, "per_gpu": 1, "parallel": None}

    def sizes(free: int | None) -> list[tuple[str, int, int, bool]]:
        batches = batches_of(groups, free=free, **given)  # type: ignore[arg-type]
        return [(batch.mode, len(batch.runs), batch.tasks, batch.canary) for batch in batches]

    assert sizes(None) == [("array", 1, 1, True)] * 2 + [("array", 4, 4, False), ("array", 1, 1, False)] * 2
    assert sizes(8) == [("array", 1, 1, True)] * 2 + [("pool", 5, 3, False), ("pool", 5, 3, False)]
    assert sizes(3) == [("array", 1, 1, True), ("pool", 5, 1, False)]
    assert sizes(0) == []
    every = [run for batch in batches_of(groups, free=None, **given) for run in batch.runs]  # type: ignore[arg-type]
    assert sorted(every) == list(range(12))


def test_free_places_are_counted_for_the_user_and_the_quality_of_service() -> None:
    queue = [Job("1", (0, 1, 2), PENDING, "PENDING", "", qos="capped"), Job("2", None, ENDED, "FAILED", "")]
    limits = SiteLimits(max_submit=50, per_qos={"capped": 10}, default_qos="normal")
    assert limits.free(queue, "capped") == 7 and limits.free(queue, None) == 47
    assert SiteLimits().free(queue, None) is None


def test_bad_nodes_are_those_where_only_failures_happen() -> None:
    def attempt(node: str, state: str, cause: str | None = None) -> dict[str, object]:
        return {"node": node, "state": state, "cause": cause}

    failures = [attempt("gpu03", FAILED, CODE)] * 3
    assert bad_nodes(failures) == [], "it may be the runs"
    assert bad_nodes([*failures, attempt("gpu01", FINISHED)]) == ["gpu03"]
    assert bad_nodes([*failures, attempt("gpu01", FINISHED), attempt("gpu03", FINISHED)]) == []
    lost = [attempt("gpu02", INTERRUPTED, NODE)] * 3
    assert bad_nodes([*lost, attempt("gpu01", INTERRUPTED, STOPPED)]) == []
    assert bad_nodes([*lost, attempt("gpu01", FAILED, CODE)]) == ["gpu02"]


@pytest.mark.parametrize(
    ("word", "reason", "state"),
    [
        ("PENDING", "Resources", PENDING),
        ("PENDING", "JobHeldUser", PENDING),
        ("PENDING", "launch failed requeued held", STUCK),
        ("PENDING", "launch_failed_requeued_held", STUCK),
        ("PENDING", "JobHoldMaxRequeue", STUCK),
        ("RUNNING", "None", RUNNING),
        ("NODE_FAIL", "None", ENDED),
    ],
)
def test_states_of_jobs(word: str, reason: str, state: str) -> None:
    job = job_of(f"41|0-2|{word}||normal|{reason}|{comment_of('ab')}")
    assert (job.state, job.ids[-1], nonce_of(job.comment)) == (state, "41_2", "ab")


def test_slurms_ways_of_writing() -> None:
    assert task_numbers("0-2,7,10-14:2%8") == (0, 1, 2, 7, 10, 12, 14)
    assert memory_bytes("64G") == 64 * 2**30 and memory_bytes("512") == 512 and memory_bytes("") is None
    assert seconds("1-02:00:30") == 93630 and seconds("05:00") == 300 and seconds("UNLIMITED") == float("inf")
    assert nonce_of(comment_of("ab12")) == "ab12" and nonce_of("(null)") is None
