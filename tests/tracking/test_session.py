"""W&B mirrors a run, offline by default, and never blocks one."""

import socket
import time
from pathlib import Path

import pytest

from qlora_lab.runs.identity import run_id
from qlora_lab.tracking.session import STEP, NoSession, open_session
from tests.helpers import tiny


@pytest.fixture(autouse=True)
def isolated_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def offline_files(folder: Path, identifier: str) -> list[Path]:
    return sorted(folder.glob(f"wandb/offline-run-*-{identifier}/run-{identifier}.wandb"))


def test_none_writes_nothing(tmp_path: Path) -> None:
    session = open_session(tiny(tmp_path), "0" * 12, "study", tmp_path)
    assert isinstance(session, NoSession)
    assert not any(tmp_path.iterdir())


def test_offline_holds_config_history_summary_and_the_adapter(tmp_path: Path) -> None:
    config = tiny(tmp_path, "tracking=wandb_offline", "tracking.tags=[mine]")
    identifier = run_id(config)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    session = open_session(config, identifier, "a_study", tmp_path)
    session.log(1, {"train/loss": 2.5})
    session.adapter(adapter)
    session.finish("finished", {"eval/loss": 1.25})
    (file,) = offline_files(tmp_path, identifier)
    written = file.read_bytes()
    for expected in (identifier, "a_study", "mine", "train/loss", STEP, "eval/loss", "adapter-", "tiny_random"):
        assert expected.encode() in written, expected


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    config = tiny(tmp_path, "tracking=wandb_offline")
    identifier = run_id(config)
    for step, state in ((1, "interrupted"), (2, "finished")):
        session = open_session(config, identifier, "a_study", tmp_path)
        session.log(step, {"train/loss": 1.0})
        session.finish(state, {})
        time.sleep(1.1)  # W&B names the fragment's folder by the second
    assert len(offline_files(tmp_path, identifier)) == 2  # two fragments of one id, merged on the training step


def test_an_unreachable_server_means_offline_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    config = tiny(tmp_path, "tracking=wandb_online", "tracking.init_timeout_s=2")
    session = open_session(config, run_id(config), "a_study", tmp_path)
    session.log(1, {"train/loss": 2.5})
    session.finish("finished", {"eval/loss": 1.25})
    assert "W&B is not reachable" in capsys.readouterr().out
    assert len(offline_files(tmp_path, run_id(config))) == 1
