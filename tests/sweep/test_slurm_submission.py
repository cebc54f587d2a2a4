"""Submitting to a scheduler that only remembers, so that its answers can be chosen."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.errors import LaunchError
from qlora_lab.runs.causes import CODE, NODE, STOPPED
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from qlora_lab.runs.lease import Claim
from qlora_lab.sweep.chunk import Chunk, chunk_file
from qlora_lab.sweep.journal import INTENT, LOST, REFUSED, SUBMITTED, Journal
from qlora_lab.sweep.scheduler import ENDED, PENDING, RUNNING, STUCK, Job
from qlora_lab.sweep.slurm import submit
from qlora_lab.sweep.slurm.arrays import batches_of, groups_of, shares_of
from qlora_lab.sweep.slurm.books import memory_bytes
from qlora_lab.sweep.slurm.commands import ForgottenError, LimitError, UnreachableError
from qlora_lab.sweep.slurm.limits import SiteLimits
from qlora_lab.sweep.slurm.nodes import bad_nodes
from qlora_lab.sweep.slurm.reconcile import reconcile
from qlora_lab.sweep.slurm.scheduler import job_of, task_numbers
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


@pytest.mark.parametrize(("noted", "kept", "cancelled"), [(None, "999", "1000"), ("1000", "1000", "999")])
def test_of_two_jobs_for_the_same_runs_the_one_that_others_wait_for_is_kept(
    tmp_path: Path, runs: list[RunFolder], noted: str | None, kept: str, cancelled: str
) -> None:
    """The first by number, unless another is the one whose id the launcher has heard."""
    scheduler = Scheduler()
    submission(tmp_path, scheduler).launch(runs[:1])
    (job,) = scheduler.queue
    (nonce,) = Journal(tmp_path / "slurm").entries()
    (tmp_path / "slurm" / "journal.jsonl").unlink()
    journal = Journal(tmp_path / "slurm")
    journal.append(INTENT, nonce, mode="array", generation="1", resource_class="1")
    if noted is not None:
        journal.append(SUBMITTED, nonce, job=noted)
    for number in ("1000", "999", "1000"):
        scheduler.queue.append(replace(job, job=number))
    scheduler.queue.remove(job)
    reconcile(journal, scheduler)  # type: ignore[arg-type]
    assert (journal.entries()[nonce]["job"], scheduler.cancelled) == (kept, [cancelled])


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


def test_of_two_answers_that_got_lost_the_first_job_is_taken(
    tmp_path: Path, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "BACK_OFF_S", (0.0,))
    scheduler = Scheduler()
    scheduler.answers = [(UnreachableError("no answer"), True)]

    def twice() -> list[Job]:
        return [replace(job, job=number) for job in scheduler.queue for number in ("1000", "999")]

    monkeypatch.setattr(scheduler, "query", twice)
    assert submission(tmp_path, scheduler).launch(runs[:1]).jobs == ["999"]


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


@pytest.mark.parametrize(
    ("tasks", "parallel", "shares"),
    [
        ([1000] * 9 + [999], 64, [7, 7, 7, 7, 6, 6, 6, 6, 6, 6]),
        ([1000, 1000, 99], 64, [31, 30, 3]),
        ([5], 64, [64]),
        ([10, 10, 10], 2, [1, 1, 1]),
        ([], 2, []),
    ],
)
def test_arrays_share_what_may_run_at_once_by_their_sizes(tasks: list[int], parallel: int, shares: list[int]) -> None:
    assert sorted(shares_of(tasks, parallel), reverse=True) == shares


def test_what_earlier_commands_queued_counts_among_what_may_run_at_once(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    submission(tmp_path, scheduler, max_parallel=3).launch(runs[:2])
    scheduler.queue = [replace(scheduler.queue[0], state=ENDED, word="COMPLETED"), scheduler.queue[1]]
    submission(tmp_path, scheduler, max_parallel=3).launch(runs[2:])
    assert [option(script, "array") for script in scheduler.scripts] == ["0-0", "0-0", "0-0", "0-1"]
    scheduler.end()
    submission(tmp_path, scheduler, max_parallel=3).launch(runs[:2])
    submission(tmp_path, scheduler, max_parallel=3).launch(runs[2:])
    assert option(scheduler.scripts[-1], "array") == "0-1%1", "a canary and one task wait already"


def test_plans_of_one_study_are_submitted_one_after_the_other(
    tmp_path: Path, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share runs, and a look at the queue does not show what the other is about to submit."""
    other = Claim(tmp_path).attempt()
    assert other is not None
    scheduler = Scheduler()
    before: list[int] = []

    def end_the_other(seconds: float) -> None:
        before.append(len(scheduler.scripts))
        other.release()

    monkeypatch.setattr(submit.time, "sleep", end_the_other)
    assert submission(tmp_path / "plan", scheduler, lock=tmp_path).launch(runs[:1]).submitted
    assert before == [0]


def test_free_places_are_counted_for_the_user_and_the_quality_of_service() -> None:
    queue = [Job("1", (0, 1, 2), PENDING, "PENDING", "", qos="capped"), Job("2", None, ENDED, "FAILED", "")]
    limits = SiteLimits(max_submit=50, per_qos={"capped": 10}, default_qos="normal")
    assert limits.free(queue, "capped") == 7 and limits.free(queue, None) == 47
    assert SiteLimits().free(queue, None) is None
    assert replace(limits, max_jobs=10_000).free(queue, None, in_memory=9_990) == 9, "one below the limit"


def test_a_study_above_what_the_controller_keeps_of_all_users_goes_into_a_pool(
    tmp_path: Path, runs: list[RunFolder]
) -> None:
    scheduler = Scheduler(SiteLimits(max_jobs=7))
    scheduler.queue = [Job("41", (0, 1, 2), ENDED, "COMPLETED", "somebody else's")]
    outcome = submission(tmp_path, scheduler).launch(runs)
    assert outcome.submitted == [run.run_id for run in runs] and not outcome.left
    assert [option(script, "array") for script in scheduler.scripts] == ["0-0", "0-1"]


NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


def attempt(node: str, state: str, cause: str | None = None, hours_ago: float = 1.0) -> dict[str, object]:
    ended = NOW - timedelta(hours=hours_ago)
    return {"node": node, "state": state, "cause": cause, "ended_at": ended.isoformat(timespec="seconds")}


def test_bad_nodes_are_those_where_only_failures_happen() -> None:
    failures = [attempt("gpu03", FAILED, CODE)] * 3
    assert bad_nodes(failures, NOW) == [], "it may be the runs"
    assert bad_nodes([*failures, attempt("gpu01", FINISHED)], NOW) == ["gpu03"]
    assert bad_nodes([*failures, attempt("gpu01", FINISHED), attempt("gpu03", FINISHED)], NOW) == []
    lost = [attempt("gpu02", INTERRUPTED, NODE)] * 3
    assert bad_nodes([*lost, attempt("gpu01", INTERRUPTED, STOPPED)], NOW) == []
    assert bad_nodes([*lost, attempt("gpu01", FAILED, CODE)], NOW) == ["gpu02"]


def test_a_bad_node_is_tried_again_after_a_day_and_what_was_good_does_not_excuse_it() -> None:
    others = [attempt("gpu01", FINISHED)]
    assert bad_nodes([*others, *[attempt("gpu02", INTERRUPTED, NODE, hours_ago=25)] * 3], NOW) == []
    killed = {"node": "gpu02", "state": "running", "cause": NODE, "ended_at": None, "started_at": NOW.isoformat()}
    assert bad_nodes([*others, *[killed] * 3, attempt("gpu02", FINISHED, hours_ago=25)], NOW) == ["gpu02"]


def test_nodes_that_the_user_leaves_out_stay_left_out(tmp_path: Path, runs: list[RunFolder]) -> None:
    for run in runs[:3]:
        run.begin(node="gpu02")
        run.end(INTERRUPTED, 1.0, cause=NODE)
    runs[3].begin(node="gpu01")
    runs[3].end(FINISHED, 1.0)
    scheduler = Scheduler()
    outcome = submission(tmp_path, scheduler, slurm=SlurmConfig(extra={"exclude": "gpu[07-09]"})).launch(runs[:1], runs)
    assert [option(script, "exclude") for script in scheduler.scripts] == ["'gpu[07-09],gpu02'"]
    assert "they stay away from gpu02, where attempts ended badly, and none well, in the last 24 h" in outcome.lines()


@pytest.mark.parametrize(
    ("word", "reason", "state"),
    [
        ("PENDING", "Resources", PENDING),
        ("PENDING", "JobHeldUser", PENDING),
        ("PENDING", "launch failed requeued held", STUCK),
        ("PENDING", "launch_failed_requeued_held", STUCK),
        ("PENDING", "JobHoldMaxRequeue", STUCK),
        ("RUNNING", "None", RUNNING),
        ("COMPLETING", "None", RUNNING),
        ("NODE_FAIL", "None", ENDED),
        ("CANCELLED", "None", ENDED),
        ("OUT_OF_MEMORY", "None", ENDED),
        ("REQUEUE_HOLD", "job requeued in held state", PENDING),
        ("RESV_DEL_HOLD", "Reservation", PENDING),
        ("SPECIAL_EXIT", "job requeued in special exit state", PENDING),
        ("A_WORD_OF_A_LATER_VERSION", "None", PENDING),
    ],
)
def test_states_of_jobs(word: str, reason: str, state: str) -> None:
    job = job_of(f"41|0-2|{word}||normal|{reason}|{comment_of('ab')}")
    assert (job.state, job.ids[-1], nonce_of(job.comment)) == (state, "41_2", "ab")
    assert job.reason == (None if reason == "None" else reason)


def test_slurms_ways_of_writing() -> None:
    assert task_numbers("0-2,7,10-14:2%8") == (0, 1, 2, 7, 10, 12, 14)
    assert memory_bytes("64G") == 64 * 2**30 and memory_bytes("512") == 512 and memory_bytes("") is None
    assert seconds("1-02:00:30") == 93630 and seconds("05:00") == 300 and seconds("UNLIMITED") == float("inf")
    assert nonce_of(comment_of("ab12")) == "ab12" and nonce_of("(null)") is None
