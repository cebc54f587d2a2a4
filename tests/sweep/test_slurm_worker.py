"""What a job's process leaves behind, besides the folders of its runs."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.runs.causes import INFRASTRUCTURE, PREEMPTION
from qlora_lab.runs.folder import FAILED, FINISHED
from qlora_lab.sweep.chunk import ARRAY, Chunk
from qlora_lab.sweep.pool import ELSEWHERE
from qlora_lab.sweep.scheduler import Ending
from qlora_lab.sweep.slurm import worker

ROOT = Path(__file__).parents[2]


def test_a_run_that_ends_well_and_says_nothing_leaves_no_log(tmp_path: Path) -> None:
    chunk = Chunk(
        folder=tmp_path / "slurm",
        runs_dir=tmp_path,
        nonce="0" * 10,
        mode=ARRAY,
        run_ids=["0" * 12, "1" * 12],
        attempts=[0, 0],
        tasks=2,
        per_gpu=1,
        limit_s=60.0,
        resources=SlurmConfig(),
        generation="1" * 10,
        max_failures=2,
        commit=None,
    )
    chunk.write()
    logs = tmp_path / "slurm" / "logs"
    logs.mkdir()
    for index, told in enumerate([{}, {"fail": "bad luck"}]):
        chunk.run(index).path.mkdir()
        (chunk.run(index).path / "fake.json").write_text(json.dumps({"steps": 1, "step_s": 0.0, **told}))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment |= {"PYTHONPATH": f"{ROOT / 'tests' / 'slurm' / 'fake'}:{ROOT}", "SLURM_ARRAY_TASK_ID": str(index)}
        for log in (logs / f"{index}.log", tmp_path / f"by_hand_{index}.log"):
            with log.open("w") as file:
                words = [sys.executable, "-m", "qlora_lab.sweep.slurm.worker", str(chunk.file)]
                subprocess.run(words, env=environment, stdout=file, stderr=file, check=False, timeout=60)
    assert [chunk.run(index).state() for index in (0, 1)] == [FINISHED, FAILED]
    assert [file.name for file in logs.iterdir()] == ["1.log"]
    assert (tmp_path / "by_hand_0.log").exists(), "only logs of jobs are removed"


def test_a_node_that_does_not_see_what_to_execute_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "chunks" / "0123.json")])
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    with pytest.raises(SystemExit) as end:
        worker.main()
    assert end.value.code == 5
    said = capsys.readouterr().out
    assert said.startswith("error: gpu07 does not see") and said.count("\n") == 1
    assert "must be shared with the nodes" in said


def test_only_runs_that_are_finished_release_what_waits_for_them() -> None:
    assert [state for state, status in worker.STATUSES.items() if status == 0] == [FINISHED]
    assert ELSEWHERE not in worker.STATUSES, "so that it ends with EXIT_LOST"


def test_a_requeued_job_that_still_runs_says_nothing_of_its_present_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process of the job, which shares its GPU, has just been killed."""
    began = datetime.now(UTC)
    requeued = {"41_0": [Ending("REQUEUED", ended_at=began - timedelta(minutes=3), restart=0)]}
    monkeypatch.setattr(worker.SlurmScheduler, "endings", lambda self, ids: requeued)
    record = {"job": "41_0", "log": None, "started_at": began.isoformat(timespec="seconds")}
    assert worker.cause_by_the_books(record) == INFRASTRUCTURE
    before = {**record, "started_at": (began - timedelta(hours=1)).isoformat(timespec="seconds")}
    assert worker.cause_by_the_books(before) == PREEMPTION
    causes = [worker.cause_by_the_books({**record, "restart": restart}) for restart in (0, 1)]
    assert causes == [PREEMPTION, INFRASTRUCTURE], "whatever the clocks say"
