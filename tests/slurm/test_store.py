"""A store that the nodes do not see: told from SLURM's books, and tried again when they do."""

from pathlib import Path

import pytest

from qlora_lab.runs.causes import STORE
from qlora_lab.sweep.slurm.scheduler import SlurmScheduler
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.study import FakeStudy


def has_failed(job: str) -> bool:
    """Whether both the queue and the books, which lag behind it, say that a job is over."""
    endings = SlurmScheduler().endings([job]).get(job, [])
    waiting = [job_id for each in SlurmScheduler().query() if each.goes_on for job_id in each.ids]
    return [ending.word for ending in endings] == ["FAILED"] and job not in waiting


def test_a_store_that_is_not_there_when_the_jobs_start(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = FakeStudy(cluster, tmp_path / "runs", 4)
    canary, rest = study.launch(extra={"hold": True})["jobs"]
    study.runs_dir.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    SlurmScheduler().release([canary, rest])
    wait_until(lambda: cluster.job_states(f"--jobs={canary}") == {f"{canary}_0": "FAILED"}, 240)
    (tmp_path / "elsewhere").rename(study.runs_dir)
    assert study.states() == ["new"] * 4
    wait_until(lambda: has_failed(f"{canary}_0"), 240)
    again = study.launch()
    assert (study.runs[0].status() or {})["cause"] == STORE
    assert study.runs[0].run_id not in again["submitted"], "it failed, and is asked for by name"
    study.wait_until_quiet()
    study.launch(retry_failed=True)
    study.wait_until_finished()
    study.check_each_was_done_once()
    assert study.causes(0) == [STORE]
