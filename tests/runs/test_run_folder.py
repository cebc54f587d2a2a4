"""The run folder survives what happens to processes and disks."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora_lab.errors import RunFolderError
from qlora_lab.runs import files
from qlora_lab.runs.causes import DISK, GPU_MEMORY, INFRASTRUCTURE, RULES, TIME_LIMIT
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW, RUNNING, RunFolder
from qlora_lab.runs.heartbeat import BEAT
from qlora_lab.runs.identity import run_id
from qlora_lab.runs.metrics_file import MetricsFile
from qlora_lab.sweep.settle import give_up
from tests.helpers import tiny
from tests.small_disk import fill, small_disk


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = tiny(tmp_path)
    return RunFolder.create(tmp_path, run_id(config), config)


def test_config_survives_the_round_trip(folder: RunFolder, tmp_path: Path) -> None:
    assert folder.config() == tiny(tmp_path)


def test_a_renamed_folder_is_refused(folder: RunFolder) -> None:
    moved = folder.path.rename(folder.path.with_name("0" * 12))
    with pytest.raises(RunFolderError, match="was the folder renamed"):
        RunFolder(moved).config()


def test_another_attempt_takes_what_is_no_part_of_the_id_and_keeps_its_threads(tmp_path: Path) -> None:
    first = tiny(tmp_path, "trainer.threads=2", "paths.data_dir=/first")
    folder = RunFolder.create(tmp_path, run_id(first), first)
    second = tiny(tmp_path, "trainer.threads=7", "paths.data_dir=/second", "tracking.tags=[again]")
    RunFolder.create(tmp_path, folder.run_id, second)
    assert folder.config() == second  # nothing has begun
    RunFolder.create(tmp_path, folder.run_id, first)
    folder.begin()
    folder.end(FAILED, 1.0)
    RunFolder.create(tmp_path, folder.run_id, second)
    config = folder.config()
    assert (config.paths.data_dir, config.tracking.tags, config.trainer.threads) == ("/second", ["again"], 2)


def test_only_a_run_that_another_micro_batch_may_help_takes_a_new_one(tmp_path: Path) -> None:
    """Others go on from their checkpoint with the one that they have, also those that are out of tries."""
    first, second = (tiny(tmp_path, f"trainer.micro_batch_size={size}") for size in (8, 2))
    assert run_id(first) == run_id(second)
    folder = RunFolder.create(tmp_path, run_id(first), first)
    for state, cause, kept in (
        (INTERRUPTED, GPU_MEMORY, 8),
        (FAILED, TIME_LIMIT, 8),
        (FAILED, DISK, 8),
        (FAILED, GPU_MEMORY, 2),
    ):
        folder.begin()
        folder.end(state, 1.0, cause=cause)
        RunFolder.create(tmp_path, folder.run_id, second)
        assert folder.config().trainer.micro_batch_size == kept


def test_a_run_that_is_given_up_keeps_its_micro_batch(tmp_path: Path) -> None:
    first, second = (tiny(tmp_path, f"trainer.micro_batch_size={size}") for size in (8, 2))
    folder = RunFolder.create(tmp_path, run_id(first), first)
    for _ in range(RULES[INFRASTRUCTURE].attempts):
        folder.begin()
        folder.end(INTERRUPTED, 1.0, cause=INFRASTRUCTURE)
    give_up(folder)
    assert folder.state() == FAILED
    RunFolder.create(tmp_path, folder.run_id, second)
    assert folder.config().trainer.micro_batch_size == 8


def test_a_run_that_is_executed_or_finished_keeps_its_config(folder: RunFolder, tmp_path: Path) -> None:
    before = folder.config()
    with folder.lock():
        folder.begin()
        RunFolder.create(tmp_path, folder.run_id, tiny(tmp_path, "paths.data_dir=/elsewhere"))
        assert folder.config() == before
        folder.end(FINISHED, 1.0)
    RunFolder.create(tmp_path, folder.run_id, tiny(tmp_path, "paths.data_dir=/elsewhere"))
    assert folder.config() == before


def test_those_who_look_are_not_taken_for_the_run(folder: RunFolder) -> None:
    folder.begin()
    with folder.lock() as lease:
        beat = (lease.path / BEAT).read_bytes()
    lease.path.mkdir()
    (lease.path / BEAT).write_bytes(beat)  # as a killed holder leaves it
    said: list[str] = []
    with (lease.path / BEAT).open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another observer
        assert not folder.is_held() and folder.state() == INTERRUPTED
        with folder.lock(log=said.append):
            assert folder.is_held()
    assert not said, "who looks for a moment executes nothing"


def test_states(folder: RunFolder) -> None:
    assert folder.state() == NEW
    with folder.lock():
        folder.begin()
        assert folder.state() == RUNNING
    assert folder.state() == INTERRUPTED  # nobody holds it: its process died without a word
    folder.begin()
    folder.end(FAILED, 7.5, ValueError("bad luck"))
    assert folder.state() == FAILED
    status = folder.status()
    assert status is not None
    assert status["attempt"] == 2
    assert status["error"]["type"] == "ValueError" and "bad luck" in status["error"]["traceback"]


def test_an_attempt_records_which_start_of_its_job_it_is(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)  # where the tests are a job themselves
    found = []
    for variables in ({}, {"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        folder.begin()
        found.append((folder.status() or {})["restart"])
    assert found == [None, 0, 2], "SLURM counts only what it has requeued"


def test_the_lock_of_a_killed_process_is_free(folder: RunFolder) -> None:
    code = (
        "import sys, time; from pathlib import Path; from qlora_lab.runs.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    assert folder.is_held()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not folder.is_held()


def test_a_second_process_waits_and_says_so(folder: RunFolder) -> None:
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with folder.lock(poll_s=0.01, log=said.append):
            order.append("second")

    with folder.lock():
        waiting = threading.Thread(target=second)
        waiting.start()
        while not said:
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert len(said) == 1 and "is being executed by another process" in said[0]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    files.write_json(file, {"loss": 1.0})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(file, {"loss": 2.0})
    assert json.loads(file.read_text()) == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_in_common_is_linked_once_and_copied_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = tmp_path / "rows", tmp_path / "data" / "rows"
    source.write_text("one\n")
    for _ in range(2):  # the second attempt of a run finds it there
        files.link_or_copy(source, path)
        assert path.samefile(source) and [file.name for file in path.parent.iterdir()] == ["rows"]
    source.unlink()
    source.write_text("two\n")  # made anew in the cache
    assert path.read_text() == "one\n"

    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(files.os, "link", other_disk)
    files.link_or_copy(source, path)
    assert path.read_text() == "two\n" and not path.samefile(source)
    assert [file.name for file in path.parent.iterdir()] == ["rows"]
    with pytest.raises(FileNotFoundError):
        files.link_or_copy(tmp_path / "none", path)
    assert path.read_text() == "two\n"


def test_what_fills_the_disk_can_still_be_recorded(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512) as disk:
        folder = RunFolder(disk / ("0" * 12))
        with folder.lock():
            folder.begin()
            metrics = MetricsFile(folder, lambda: 1.0)
            metrics.append(1, {"train/loss": 2.5})
            fill(disk)
            with pytest.raises(OSError, match="No space left") as full:
                folder.write_result({"text": "x" * 5000})
            folder.end(FAILED, 1.0, full.value)
        status = folder.status()
    assert status is not None and (status["state"], status["cause"], status["step"]) == (FAILED, DISK, 1)


def test_json_is_valid_whatever_the_numbers(tmp_path: Path, folder: RunFolder) -> None:
    """Python would write NaN and Infinity, which no other reader of JSON takes."""
    folder.write_result({"metrics": {"eval/loss": float("nan"), "a": [1.5, float("-inf")], "b": (1, True, "x", None)}})
    folder.write_evaluation([{"loss_sum": float("inf")}], [])
    with folder.lock():
        MetricsFile(folder, lambda: 1.0).append(3, {"train/loss": float("nan")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    texts = [file.read_text() for file in folder.path.rglob("*.json*")]
    read = [json.loads(line, parse_constant=refuse) for text in texts if text for line in [text]]
    assert {"metrics": {"eval/loss": None, "a": [1.5, None], "b": [1, True, "x", None]}} in read
    assert {"loss_sum": None} in read and {"step": 3, "time_s": 1.0, "train/loss": None} in read


def test_elapsed_time_goes_on_over_attempts(folder: RunFolder) -> None:
    assert folder.elapsed_s() == 0.0
    folder.begin()
    folder.end(INTERRUPTED, 12.5)
    assert folder.elapsed_s() == 12.5
    with folder.lock():
        folder.begin()
        assert folder.elapsed_s() == 12.5
        MetricsFile(folder, lambda: 20.0).append(1, {"train/loss": 2.0})  # and then it is killed
    assert folder.elapsed_s() == 20.0


def test_metrics_of_a_step_are_found_over_attempts(folder: RunFolder) -> None:
    assert not folder.has_metric(0, "eval/loss")
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "eval/loss": 2.')  # killed while writing
    assert not folder.has_metric(0, "eval/loss")
    with folder.lock():
        metrics_file = MetricsFile(folder, lambda: 1.0)
        metrics_file.append(0, {"eval/loss": 2.5})
        metrics_file.append(1, {"train/loss": 2.5})
    assert folder.has_metric(0, "eval/loss") and folder.has_metric(1, "train/loss")
    assert not folder.has_metric(1, "eval/loss") and not folder.has_metric(0, "train/loss")


def test_metrics_after_half_a_line(folder: RunFolder) -> None:
    with folder.lock():
        MetricsFile(folder, lambda: 1.0).append(1, {"train/loss": 2.0})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tra')  # killed while writing
    assert folder.last_metrics() == pytest.approx({"step": 1, "time_s": 1.0, "train/loss": 2.0})
    with folder.lock():
        MetricsFile(folder, lambda: 1.0).append(2, {"train/loss": 1.5})
    assert [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    last = folder.last_metrics()
    assert last is not None and last["step"] == 2 and last["train/loss"] == 1.5


def test_finished_is_not_undone_by_a_missing_lock(folder: RunFolder) -> None:
    folder.begin()
    folder.end(FINISHED, 1.0)
    assert folder.state() == FINISHED
