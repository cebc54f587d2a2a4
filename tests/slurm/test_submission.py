"""Launchers and controllers that die: nothing is lost, nothing is done twice."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.accounting import RUN_LIMIT, SUBMIT_LIMIT
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.study import CommandStudy, FakeStudy, said

KILLS = int(os.environ.get("QLORA_LAB_LAUNCHER_KILLS", "50"))
TAKES_LONGER = 25  # each 25th launcher to be killed is the whole first command, which composes its study too
SUBMITTING_S = 0.2  # from the first line in the journal to the last, about


def test_a_study_is_one_canary_and_one_array(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 10)
    first = study.launch()
    assert len(first["jobs"]) == 2 and len(first["submitted"]) == 10
    again = study.launch()
    assert not again["jobs"] and len(again["queued"]) == 10
    study.wait_until_finished()
    study.check_each_was_done_once()
    assert not study.launch()["jobs"]


def test_what_is_launched_after_a_finished_run_needs_no_canary(cluster: Cluster, tmp_path: Path) -> None:
    FakeStudy(cluster, tmp_path, 2).launch()
    FakeStudy(cluster, tmp_path, 2).wait_until_finished()
    more = FakeStudy(cluster, tmp_path, 5)
    assert len(more.launch()["jobs"]) == 1
    more.wait_until_finished()


def test_arrays_are_as_long_as_the_site_allows(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 2100, extra={"hold": True})
    assert len(study.launch()["jobs"]) == 4  # a canary, 1000, 1000, 99
    study.launch()
    assert sum(1 for _ in cluster.job_states()) >= 2100


def test_a_launcher_killed_anywhere_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    """The project's own commands, killed after a random time and started again; the last one is left alone.

    Each second one is killed a random moment after it began to submit, so that many die while sbatch runs.
    """
    moments = random.Random(int(os.environ.get("QLORA_LAB_SEED", "0")))

    def begin(study: CommandStudy, number: int) -> subprocess.Popen[str]:
        return study.first() if number % TAKES_LONGER == 0 else study.steer("resume")

    whole_s = []
    for number in range(2):
        study = CommandStudy(cluster, tmp_path / f"measured{number}", 3)
        study.plan.write()
        begun = time.monotonic()
        assert "submitted 3 runs" in said(begin(study, number))
        whole_s.append(time.monotonic() - begun)
    studies = [CommandStudy(cluster, tmp_path / str(number), 3) for number in range(KILLS)]
    reached: Counter[str] = Counter()
    for number, study in enumerate(studies):
        if number % TAKES_LONGER:
            study.plan.write()
        process = begin(study, number)
        if number % 2:
            wait_until(lambda s=study, p=process: s.journal() or p.poll() is not None, 60, every_s=0.001)  # type: ignore[misc]
            time.sleep(moments.uniform(0, SUBMITTING_S))
        else:
            time.sleep(moments.uniform(0.3, 1.0) * whole_s[number % TAKES_LONGER > 0])
        process.kill()
        process.communicate()
        reached[study.last_event()] += 1
        said(begin(study, number))
    print(f"the last that killed launchers had noted: {dict(reached)}")
    assert reached["intent"] > 0, "between its intent and sbatch's answer"
    for study in studies:
        study.wait_until_finished(180)
        study.check_each_was_done_once()
        assert [run.attempts() for run in study.runs] == [1] * 3, "each run was executed once"


def test_two_launchers_at_once_submit_once(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 6)
    processes = [study.start() for _ in range(3)]
    outcomes = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    assert sorted(len(outcome["submitted"]) for outcome in outcomes) == [0, 0, 6]
    study.wait_until_finished()
    study.check_each_was_done_once()


@pytest.mark.parametrize("event", [None, "intent", "submitted"])
def test_a_controller_killed_during_submission(cluster: Cluster, tmp_path: Path, event: str | None) -> None:
    """Before the launcher asks it anything, when it is about to submit the canary, or the array after it."""
    study = FakeStudy(cluster, tmp_path, 6)
    if event is None:
        cluster.kill_controller()
    process = study.start()
    if event is not None:
        wait_until(lambda: event in study.journal(), 60, every_s=0.001)
        cluster.kill_controller()
    time.sleep(3)
    cluster.start_controller()
    _, err = process.communicate(timeout=200)
    if process.returncode != 0:  # it could not even ask: the same command goes on
        assert "cannot reach SLURM" in err or "did not answer" in err
        study.launch()
    study.go_on()
    study.check_each_was_done_once()


def test_a_controller_killed_a_second_after_submission(cluster: Cluster, tmp_path: Path) -> None:
    """It may have forgotten jobs whose ids sbatch has printed, or start one again that runs, and hold it for ever."""
    study = FakeStudy(cluster, tmp_path, 6)
    study.launch()
    assert study.has_jobs()
    time.sleep(1)
    cluster.kill_controller()
    cluster.start_controller()
    study.go_on()
    study.check_each_was_done_once()
    study.launch()
    wait_until(lambda: not study.has_jobs(), 30)


def test_above_a_submit_limit_workers_take_the_runs(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.accounting:
        pytest.skip("limits are accounting's")
    study = FakeStudy(cluster, tmp_path, SUBMIT_LIMIT + 40, qos="capped", max_parallel=RUN_LIMIT)
    study.tell(steps=1, step_s=0.01)
    outcome = study.launch()
    assert len(outcome["submitted"]) == SUBMIT_LIMIT + 40 and not outcome["left"]
    study.wait_until_finished(180)
    study.check_each_was_done_once()
    assert len(cluster.output("sacct", "-nX", "-j", ",".join(outcome["jobs"])).splitlines()) <= RUN_LIMIT + 1


def test_above_what_the_controller_keeps_workers_take_the_runs(
    cluster_without_accounting: Cluster, tmp_path: Path
) -> None:
    """MaxJobCount, which all users share, and finished jobs with them."""
    cluster = cluster_without_accounting
    wait_until(lambda: not cluster.job_states(), 60)
    with cluster.other_settings({"MaxJobCount=60000": "MaxJobCount=40"}):
        study = FakeStudy(cluster, tmp_path, 60, max_parallel=4)
        study.tell(steps=1, step_s=0.01)
        outcome = study.launch()
        assert len(outcome["submitted"]) == 60 and not outcome["left"]
        study.wait_until_finished(180)
        study.check_each_was_done_once()


def test_several_runs_share_a_gpu(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 9, runs_per_gpu=2, max_parallel=2)
    study.tell(steps=2, step_s=0.3)
    study.launch()
    study.wait_until_finished()
    study.check_each_was_done_once()


def test_without_accounting(cluster_without_accounting: Cluster, tmp_path: Path) -> None:
    """Killed runs are noticed and retried though nobody keeps books but the file of completed jobs."""
    study = FakeStudy(cluster_without_accounting, tmp_path, 6)
    study.tell(1, 4, steps=3, step_s=0.1, die=1)
    study.launch()
    study.wait_until_quiet()
    assert sorted(study.states()).count("finished") == 4
    assert len(study.launch()["submitted"]) == 2
    study.wait_until_finished()
    study.check_each_was_done_once()
    assert [study.runs[1].status()["history"][0][key] for key in ("cause", "attempt")] == ["infrastructure", 1]


def test_a_run_that_always_crashes_holds_the_others_back(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 12, pool=True, max_parallel=1, max_failures=2)
    study.tell(fail="always the same")
    study.launch()
    study.wait_until_quiet()
    # the canary failed, so that nothing else began
    assert study.states().count("failed") == 1 and study.states().count("new") == 11


def test_failures_that_a_canary_does_not_show_open_the_breaker(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 1)
    study.tell(0, steps=1)
    study.launch()
    study.wait_until_finished()
    study = FakeStudy(cluster, tmp_path, 20, pool=True, max_parallel=1, max_failures=3)
    study.tell(*range(1, 20), fail="always the same")
    study.launch()
    study.wait_until_quiet()
    assert study.states().count("failed") == 3
    assert "the first 3 runs all failed alike" in study.logs()


def test_waiting_may_be_killed_and_submits_again(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 5)
    study.tell(2, steps=3, die=1)
    killed = study.start(wait=True)
    wait_until(lambda: cluster.job_states(), 30)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    patient = study.start(wait=True)
    _, err = patient.communicate(timeout=150)
    assert patient.returncode == 0, err
    study.check_each_was_done_once()
    assert study.runs[2].attempts() == 2


def test_a_partition_that_does_not_exist_is_refused_in_one_sentence(cluster: Cluster, tmp_path: Path) -> None:
    process = FakeStudy(cluster, tmp_path, 3, partition="nowhere").start()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "sbatch refused" in err.splitlines()[-1] and "Invalid partition" in err.splitlines()[-1]
