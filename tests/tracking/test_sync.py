"""Offline runs reach W&B once and whole, however often the upload is interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora_lab import sync
from qlora_lab.runs.mirror import STEP
from tests.mirrored_runs import mirrored, standing
from tests.wandb_stand_in import WandbStandIn


@pytest.fixture
def runs_dir(tmp_path: Path, isolated_wandb: None) -> Path:
    """Four runs, one of two attempts and one that was killed in the middle of a record, and one killed at once."""
    for number in range(4):
        lines = [{STEP: step, "train/loss": step / 7} for step in range(1, 11)]
        mirrored(tmp_path / "runs" / f"run{number}", f"run{number}", lines, standing("finished"))
    mirrored(tmp_path / "runs" / "run0", "run0", [{STEP: 11, "train/loss": 9.0}], standing("finished"))
    (torn,) = (tmp_path / "runs" / "run3" / "wandb").glob("offline-run-*/run-run3.wandb")
    torn.write_bytes(torn.read_bytes()[:-40])
    os.utime(torn, (0, 0))  # long ago
    (tmp_path / "runs" / "run3" / "status.json").write_text('{"state": "interrupted"}')
    empty = tmp_path / "runs" / "run9" / "wandb" / "offline-run-20200101_000000-run9" / "run-run9.wandb"
    empty.parent.mkdir(parents=True)
    empty.write_bytes(b":W&B\xe1\xbe\x00")
    return tmp_path / "runs"


def lines_of(server: WandbStandIn) -> dict[str, int]:
    return {name: len(run.history) for (_, _, name), run in sorted(server.runs.items())}


def call(runs_dir: Path, *options: str) -> int:
    try:
        sync.main([str(runs_dir), *options])
    except SystemExit as end:
        return int(str(end.code))
    return 0


WHOLE = {"run0": 11, "run1": 10, "run2": 10, "run3": 10}


def test_everything_is_uploaded_once(
    runs_dir: Path, wandb_server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(runs_dir, "--plan") == 0 and not wandb_server.runs
    assert "6 W&B files: 5 to upload, 0 uploaded already, 1 empty" in capsys.readouterr().out
    assert call(runs_dir, "--batch", "2") == 0
    assert lines_of(wandb_server) == WHOLE
    asked = len(wandb_server.operations)
    assert call(runs_dir) == 0
    assert "0 to upload, 5 uploaded already" in capsys.readouterr().out
    assert len(wandb_server.operations) == asked


def test_what_is_too_many_for_a_while_is_tried_again(runs_dir: Path, wandb_server: WandbStandIn) -> None:
    wandb_server.faults.status, wandb_server.faults.count = 429, 3
    assert call(runs_dir) == 0
    assert lines_of(wandb_server) == WHOLE and wandb_server.struck == 3


def test_files_that_wandb_does_not_take_keep_no_others_back(
    runs_dir: Path, wandb_server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        zeros = runs_dir / "run0" / "wandb" / f"offline-run-20200101_000000-a{number}" / f"run-a{number}.wandb"
        zeros.parent.mkdir()
        zeros.write_bytes(bytes(100))
    assert call(runs_dir, "--batch", "5") == 1
    assert lines_of(wandb_server) == WHOLE
    said = capsys.readouterr().err
    assert "error: 5 of 10 W&B files were not taken, such as" in said and "bad header" in said


def test_no_more_files_a_minute_are_sent_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        def __init__(self) -> None:
            self.now = 0.0
            self.uploads: list[float] = []

        def time(self) -> float:
            return 1e12  # long after every file was written

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

        def upload(self, files: Sequence[Path], *_: object) -> str:
            self.uploads.append(self.now)
            self.now += 0.5
            for file in files:
                file.with_name(f"{file.name}.synced").touch()
            return ""

    clock = Clock()
    monkeypatch.setattr(sync, "time", clock)
    monkeypatch.setattr(sync, "upload", clock.upload)
    for number in range(12):
        file = tmp_path / f"offline-run-20260101_000000-{number:02}" / f"run-{number:02}.wandb"
        file.parent.mkdir()
        file.write_bytes(bytes(8))
    assert call(tmp_path, "--batch", "4", "--per-minute", "120") == 0
    assert clock.uploads == [0.0, 2.0, 4.0]
    assert call(tmp_path, "--per-minute", "0") == 2


def test_a_server_that_refuses_is_said_and_the_same_command_goes_on(
    runs_dir: Path, wandb_server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb_server.faults.status = 403
    assert call(runs_dir) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: W&B cannot be reached (") and said.count("\n") == 1
    wandb_server.faults.status, wandb_server.faults.count = 500, 3  # and what fails for a while is tried again
    assert call(runs_dir) == 0
    assert lines_of(wandb_server) == WHOLE


def test_a_killed_upload_goes_on(runs_dir: Path, wandb_server: WandbStandIn) -> None:
    command = [sys.executable, "-m", "qlora_lab.sync", str(runs_dir), "--batch", "1", "--parallel", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while not any(runs_dir.rglob("*.synced")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert call(runs_dir) == 0
    assert lines_of(wandb_server) == WHOLE


def test_a_run_that_is_running_is_left_alone(runs_dir: Path) -> None:
    from qlora_lab.runs.folder import RunFolder

    folder = RunFolder(runs_dir / "run1")
    with folder.lock():
        folder.begin()
        found = sync.find(runs_dir)
    assert found.running == ["run1"] and len(found.files) == 4
    with folder.lock():
        folder.begin()
        folder.end("finished", 1.0)  # and its mirror is yet to be told
        assert sync.find(runs_dir).running == ["run1"]
    (torn,) = (runs_dir / "run3" / "wandb").glob("offline-run-*/run-run3.wandb")
    os.utime(torn)
    assert sync.find(runs_dir).running == ["run3"], "its end may be on its way"


def test_runs_that_were_online_are_taken_on_demand(runs_dir: Path, wandb_server: WandbStandIn) -> None:
    (folder,) = (runs_dir / "run1" / "wandb").glob("offline-run-*")
    folder.rename(folder.with_name(folder.name.removeprefix("offline-")))
    assert call(runs_dir) == 0
    assert lines_of(wandb_server) == {name: lines for name, lines in WHOLE.items() if name != "run1"}
    assert call(runs_dir, "--include-online") == 0
    assert lines_of(wandb_server) == WHOLE


def test_files_come_in_the_order_of_their_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["run-20260101_000000-a", "offline-run-20260102_000000-a", "run-20260103_000000-a"]
    for name in names:
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / "run-a.wandb").write_bytes(b"more than a header")
    monkeypatch.chdir(tmp_path / "wandb")
    assert [file.parent.name for file in sync.find(Path(), include_online=True).files] == names


def test_files_of_one_run_stay_in_one_batch() -> None:
    files = [Path(f"{number}/run-{name}.wandb") for number, name in enumerate("aabbbc")]
    assert [len(batch) for batch in sync.batches(files, 1)] == [2, 3, 1]


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path) == 2
    assert "no offline W&B run in" in capsys.readouterr().err
