"""W&B mirrors a run, offline by default, and never blocks or fails one."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from qlora_lab.config.schema import RunConfig
from qlora_lab.runs.identity import run_id
from qlora_lab.tracking import session as sessions
from qlora_lab.tracking.session import STEP, GuardedSession, NoSession, WandbSession, open_session
from tests.helpers import tiny
from tests.wandb_file import records

pytestmark = pytest.mark.usefixtures("isolated_wandb")

ID = "0" * 12


def offline_files(folder: Path, identifier: str) -> list[Path]:
    return sorted(folder.glob(f"wandb/offline-run-*-{identifier}/run-{identifier}.wandb"))


def offline(folder: Path, *overrides: str) -> RunConfig:
    return tiny(folder, "tracking=wandb_offline", *overrides)


def test_none_writes_nothing(tmp_path: Path) -> None:
    session = open_session(tiny(tmp_path), ID, "study", tmp_path)
    assert isinstance(session, NoSession)
    assert not any(tmp_path.iterdir())


def test_offline_holds_config_history_summary_and_the_adapter(tmp_path: Path) -> None:
    config = offline(tmp_path, "tracking.tags=[mine,tiny_random]")
    identifier = run_id(config)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    session = open_session(config, identifier, "a_study", tmp_path)
    session.log(1, {"train/loss": 2.5})
    session.adapter(adapter)
    session.finish("finished", {"eval/loss": 1.25})
    assert sum(not path.is_dir() or path.is_symlink() for path in (tmp_path / "wandb").rglob("*")) <= 5
    (file,) = offline_files(tmp_path, identifier)
    kept = records(file)
    (run,) = [record.run for record in kept if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.run_group, run.job_type) == (identifier, "a_study", "train")
    assert list(run.tags) == ["mine", "tiny_random", "nf4", "procedural_clean_128"]  # each once
    written = file.read_bytes()
    for expected in ("train/loss", STEP, "eval/loss", f"adapter-{identifier}"):
        assert expected.encode() in written, expected


def test_artifacts_are_staged_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder = tmp_path / "runs" / ID
    adapter = run_folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.chdir(tmp_path)
    session = open_session(offline(tmp_path), ID, "a_study", Path("runs") / ID)  # a relative folder, as in practice
    session.adapter(Path("runs") / ID / "adapter")
    session.finish("finished", {})
    (file,) = offline_files(run_folder, ID)
    assert records(file)
    assert str(adapter / "adapter_model.safetensors").encode() in file.read_bytes()  # from wherever it is synced
    assert "WANDB_DATA_DIR" not in os.environ
    assert not (tmp_path / "home" / "data").exists()  # W&B's own place; a home may be full, or not writable


def test_fragments_of_a_resumed_run_merge_on_the_training_step(tmp_path: Path) -> None:
    config = offline(tmp_path)
    identifier = run_id(config)
    begun = 0.0
    for step, state in ((10, "interrupted"), (20, "finished")):
        while time.time() < begun + 1.1:
            time.sleep(0.05)  # W&B names the fragment's folder by the second
        begun = time.time()
        session = open_session(config, identifier, "a_study", tmp_path)
        session.log(step, {"train/loss": 1.0})
        session.finish(state, {})
    fragments = [records(file) for file in offline_files(tmp_path, identifier)]
    assert len(fragments) == 2  # of one id
    for fragment, step in zip(fragments, (10, 20), strict=True):
        metrics = [record.metric for record in fragment if record.WhichOneof("record_type") == "metric"]
        by_glob = {metric.glob_name: metric for metric in metrics if metric.glob_name}
        assert {metric.name for metric in metrics} >= {STEP}
        assert by_glob["*"].step_metric == STEP
        rows = [record.history for record in fragment if record.WhichOneof("record_type") == "history"]
        logged = [
            {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows
        ]
        assert [(row[STEP], row["train/loss"]) for row in logged] == [(step, 1.0)]
    kinds = [[record.WhichOneof("record_type") for record in fragment] for fragment in fragments]
    assert "preempting" in kinds[0], "an interrupted run says that it will come back"
    assert "preempting" not in kinds[1]


def test_time_outs_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: (seen.append(given["settings"]), init(**given))[1])
    config = offline(tmp_path, "tracking.init_timeout_s=17", "tracking.finish_timeout_s=23")
    open_session(config, ID, "a_study", tmp_path).finish("finished", {})
    (settings,) = seen
    assert (settings.init_timeout, settings.finish_timeout) == (17, 23)


def test_an_unreachable_server_means_offline_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))  # and no other process can
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        config = tiny(tmp_path, "tracking=wandb_online", "tracking.init_timeout_s=2")
        session = open_session(config, run_id(config), "a_study", tmp_path)
        session.log(1, {"train/loss": 2.5})
        session.finish("finished", {"eval/loss": 1.25})
    assert "W&B is not reachable" in capsys.readouterr().out
    assert len(offline_files(tmp_path, run_id(config))) == 1


def test_a_model_name_that_is_a_long_path_is_cut_to_a_tag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = offline(tmp_path, f"model.name=/models/{'a' * 70}/mine")
    open_session(config, ID, "a_study", tmp_path).finish("finished", {})
    assert capsys.readouterr().out == ""
    (file,) = offline_files(tmp_path, ID)
    (run,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert f"{'a' * 59}/mine" in run.tags


def test_wandb_stages_in_the_run_folder_while_it_logs_an_artifact(tmp_path: Path) -> None:
    """Online it stages there even what it does not copy; a home may be full, or not writable."""
    places = []

    class Run:
        id = ID

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log_artifact(self, artifact: wandb.Artifact) -> None:
            places.append(wandb.env.get_data_dir())

    WandbSession(Run(), tmp_path).adapter(tmp_path)
    assert places == [str(tmp_path / "wandb")]


class Failing:
    """A session one of whose methods raises; it keeps what it was asked."""

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise BrokenPipeError("the service is gone\nTraceback ...")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._call("log")

    def adapter(self, folder: Path) -> None:
        self._call("adapter")

    def finish(self, state: str, summary: dict[str, Any]) -> None:
        self._call("finish")


@pytest.mark.parametrize("fails", ["open", "log", "adapter", "finish"])
def test_the_first_error_ends_the_tracking_in_one_line(
    fails: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = Failing(fails)

    def open_it() -> Failing:
        inner._call("open")
        return inner

    session = GuardedSession(open_it)
    for step in range(3):
        session.log(step, {"train/loss": 1.0})
    session.adapter(tmp_path)
    session.finish("finished", {})
    asked = ["open", "log", "log", "log", "adapter", "finish"]
    assert inner.calls == asked[: asked.index(fails) + 1]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "tracking stopped (the service is gone); the run goes on" in said


def test_a_ctrl_c_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(step: int, metrics: dict[str, float]) -> None:
        raise KeyboardInterrupt

    inner = Failing("nothing")
    monkeypatch.setattr(inner, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        GuardedSession(lambda: inner).log(1, {})


def test_wandb_that_cannot_start_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: Any) -> None:
        raise wandb.errors.Error("no service")

    monkeypatch.setattr(wandb, "init", broken)
    open_session(offline(tmp_path), ID, "a_study", tmp_path).log(1, {"train/loss": 1.0})
    assert "tracking stopped (no service)" in capsys.readouterr().out


def test_a_killed_service_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.teardown()  # a service that began elsewhere is no child of this process
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    session = open_session(offline(tmp_path), ID, "a_study", tmp_path)
    assert isinstance(session, GuardedSession) and isinstance(session._session, WandbSession)
    session.log(1, {"train/loss": 2.5})
    listed = subprocess.run(
        ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout
    services = [int(line.split()[0]) for line in listed.splitlines() if "wandb-core" in line]
    assert services
    for service in services:
        os.kill(service, signal.SIGKILL)
        os.waitid(os.P_PID, service, os.WEXITED | os.WNOWAIT)
    for step in range(2, 5):
        session.log(step, {"train/loss": 1.0})
    session.finish("finished", {})
    assert "tracking stopped" in capsys.readouterr().out
    another = open_session(offline(tmp_path), "1" * 12, "a_study", tmp_path)  # the next run of a sweep in one process
    another.log(1, {"train/loss": 2.5})
    another.finish("finished", {})
    assert capsys.readouterr().out == "" and len(offline_files(tmp_path, "1" * 12)) == 1


def test_the_reason_is_one_line() -> None:
    assert sessions._reason(ValueError()) == "ValueError"
    assert sessions._reason(ValueError("a\nb")) == "a"
