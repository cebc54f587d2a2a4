"""Runs that are killed, pushed out, timed out, doubled, or on nodes that go: each goes on, alone, to its result."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.study import FakeStudy

LONG = {"steps": 40, "step_s": 0.2}


def test_killed_runs_are_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 12)
    study.tell(3, 7, 11, steps=3, die=1)
    study.launch()
    study.wait_until_quiet()
    assert sorted(study.launch()["submitted"]) == [study.runs[number].run_id for number in (3, 7, 11)]
    study.wait_until_finished()
    study.check_each_was_done_once()
    assert study.causes(7) == ["infrastructure"]


def test_a_run_that_always_dies_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 1)
    study.tell(steps=30, die=100)
    for _ in range(3):
        study.launch()
        study.wait_until_quiet()
    assert study.launch()["given_up"] == [study.runs[0].run_id]
    assert study.states() == ["failed"] and study.runs[0].attempts() <= 4


def test_usr2_three_times(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 1)
    study.tell(**LONG)
    (job,) = study.launch()["jobs"]
    pid = study.wait_until_begun()["pid"]
    for _ in range(3):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.05)
    study.wait_until_finished()
    study.check_each_was_done_once()
    assert study.runs[0].attempts() == 2 and study.causes() == ["preemption"]
    assert "Restarts=1" in cluster.output("scontrol", "show", "job", f"{job}_0")


def test_sigterm_alone(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 1)
    study.tell(**LONG)
    study.launch()
    os.kill(study.wait_until_begun()["pid"], signal.SIGTERM)
    study.wait_until_finished()
    study.check_each_was_done_once()
    assert study.runs[0].attempts() == 2


def test_preemption_by_a_higher_partition(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 4, partition="scavenge", extra={"nodelist": "gpu01"})
    study.tell(steps=100, step_s=0.1)
    study.launch()
    study.wait_until_begun()  # the canary
    job = cluster.submit("sleep 3", "--partition=gpu", "--nodelist=gpu01", "--gpus-per-node=4")
    wait_until(lambda: cluster.job_states().get(job) in ("RUNNING", "COMPLETED"), 60)
    study.wait_until_finished(150)
    study.check_each_was_done_once()
    assert study.causes() == ["preemption"]


def test_preemption_without_a_warning(cluster: Cluster, tmp_path: Path) -> None:
    """As by SLURM's own settings: SIGTERM comes when the job is in the queue again already."""
    settings = {"SlurmctldParameters=preempt_send_user_signal\n": "", "GraceTime=10": "GraceTime=0"}
    with cluster.other_settings(settings):
        study = FakeStudy(cluster, tmp_path, 1, partition="scavenge", extra={"nodelist": "gpu01"})
        study.tell(steps=100, step_s=0.1)
        study.launch()
        study.wait_until_begun()
        job = cluster.submit("sleep 3", "--partition=gpu", "--nodelist=gpu01", "--gpus-per-node=4")
        wait_until(lambda: cluster.job_states().get(job) in ("RUNNING", "COMPLETED"), 60)
        study.wait_until_finished(150)
        study.check_each_was_done_once()
        assert study.causes() == ["preemption"] and study.runs[0].attempts() == 2


def test_a_time_limit_in_slices(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 1, time_limit_min=1)
    study.tell(steps=50, step_s=1.0)
    study.launch()
    study.wait_until_finished(300)
    study.check_each_was_done_once()
    assert set(study.causes()) == {"time_limit"}


def test_a_cancelled_run_stays_cancelled_until_the_next_command(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 3, extra={"nodelist": "gpu01", "exclusive": True})
    study.tell(**LONG)
    jobs = study.launch()["jobs"]
    study.wait_until_begun()  # the others wait for it
    cluster.output("scancel", *jobs)
    study.wait_until_quiet()
    time.sleep(8)  # a requeued job would be back by now
    assert cluster.quiet() and study.states() == ["interrupted", "new", "new"]
    assert (study.runs[0].status() or {})["cause"] == "stopped"
    study.tell(1, 2, steps=2)
    study.launch()
    study.wait_until_finished(120)
    study.check_each_was_done_once()


def test_a_drained_node(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 20)
    study.tell(steps=5, step_s=0.4)
    study.launch()
    study.wait_until_begun(step=1)
    cluster.drain("gpu01")
    try:
        study.wait_until_finished(120)
    finally:
        cluster.resume("gpu01")
    study.check_each_was_done_once()


def test_a_node_that_comes_back_with_its_old_step(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM starts the run elsewhere while the old process, which nobody reaches, writes on."""
    study = FakeStudy(cluster, tmp_path, 1)
    study.tell(steps=600, step_s=1.0)
    study.launch()
    old = study.wait_until_begun()
    node = old["node"]
    cluster.kill_node(node)
    wait_until(lambda: "down" in cluster.node_state(node), 90)
    assert Path(f"/proc/{old['pid']}").exists(), "the old process goes on"
    os.kill(old["pid"], signal.SIGSTOP)  # as behind a network that hangs: it neither beats nor notices
    study.tell(steps=200, step_s=0.05)
    wait_until(lambda: study.runs[0].attempts() == 2, 90)
    os.kill(old["pid"], signal.SIGCONT)
    wait_until(lambda: not alive(old["pid"]), 30)
    study.wait_until_finished(120)
    cluster.start_node(node)
    cluster.wait_for_nodes()
    study.check_each_was_done_once()
    assert study.causes() == ["node"]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(") ")[1][:1]
    except OSError:
        return False


def test_a_bad_node_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    study = FakeStudy(cluster, tmp_path, 12, max_failures=50, extra={"exclusive": True})
    study.tell(0, steps=1)
    study.tell(*range(1, 12), steps=2, step_s=0.05, fail="a broken card", nodes=["gpu02"])
    study.launch()
    study.wait_until_quiet()
    failed = study.states().count("failed")
    assert failed >= 3, "gpu02 had its share"
    outcome = study.launch(retry_failed=True)
    assert outcome["excluded"] == ["gpu02"] and len(outcome["submitted"]) == failed
    study.wait_until_finished(120)


def test_a_run_that_outgrows_its_memory_gets_more_once(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.accounting:
        pytest.skip("accounting measures it")
    study = FakeStudy(cluster, tmp_path, 1)
    study.tell(steps=60, step_s=0.5, memory_mb=1300)
    study.launch()
    study.wait_until_quiet(60)  # accounting is late, and waited for
    (job,) = study.launch()["jobs"]
    assert study.causes() == ["host_memory"] or (study.runs[0].status() or {})["cause"] == "host_memory"
    memory = json.loads(json.dumps(cluster.output("squeue", "-h", "-j", job, "-o", "%m")))
    assert memory == "2G"
