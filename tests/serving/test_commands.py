"""python -m qlora_lab.serve and .chat: how they begin, what they refuse, and how they end."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from qlora_lab import chat as chat_command
from qlora_lab import serve as serve_command
from qlora_lab.ops import registry
from qlora_lab.ops.native.load import CudaKernels, Kernels
from qlora_lab.runs.folder import RunFolder
from qlora_lab.serving.engine import Engine
from qlora_lab.serving.scheduler import Piece, Scheduler
from tests.command_line import call
from tests.serving.server import WAIT_S

TINY = ("model=tiny_random", "quant=nf4", "device=cpu", "compute_dtype=float32")


def chat(lines: str, *words: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return call("qlora_lab.chat", f"paths.cache_dir={cwd}/cache", "temperature=0", *words, cwd=cwd)


def test_a_chat_on_piped_input(
    run: RunFolder, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"run={run.path}", f"+adapters.b={adapters['b']}", "max_new_tokens=12")
    asked = ["hello", "again", "/adapter", "/adapter b", "/adapter x", "/reset", "hello", "/adapter tiny_random"]
    asked += ["/reset", "hello", "/help", "/what", "/reset", "hello", "x" * 600, "/quit", "never"]
    done = chat("\n".join(asked), *words, cwd=tmp_path, monkeypatch=monkeypatch)
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout
    assert f"  tiny_random\n* {run.run_id}\n  b\n" in said
    assert "b answers from now on." in said and "error: the adapter must be one of" in said
    assert said.count("/adapter NAME   go on with another one") == 2
    assert "error: the prompt has" in said and "shorten the prompt" in said and "never" not in said
    answers = chat("hello\n/adapter tiny_random\n/reset\nhello", *words, cwd=tmp_path, monkeypatch=monkeypatch).stdout
    first, second = answers.split("tiny_random answers from now on.\nThe conversation is forgotten.\n")
    assert first.strip() != second.strip() and said.startswith(first) and said.count(second) == 2


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cpu", "there is no libqlk_cpu.so"),
        ("cuda", "the GPU has compute capability 7.5, and the kernels need 8.0 (Ampere) or more"),
    ],
)
def test_references_in_place_of_kernels_are_told(
    device: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native: Any = SimpleNamespace(library="a library")
    for of, name in (("cpu", "KERNELS"), ("cuda", "CUDA_KERNELS")):
        none = Kernels(None, "none", reason) if of == "cpu" else CudaKernels(None, None, reason)
        monkeypatch.setattr(registry, name, none if of == device else native)
    serve_command._say_slow_kernels("cuda" if device == "cpu" else "cpu")
    assert capsys.readouterr().out == ""
    serve_command._say_slow_kernels(device)
    assert capsys.readouterr().out == f"note: kernels: reference (pure torch): {reason}\n"


def test_a_chat_says_that_it_is_slow(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KERNELS", Kernels(None, "none", "there is no compiler"))
    done = chat("", f"run={run.path}", cwd=tmp_path, monkeypatch=monkeypatch)
    assert (done.returncode, done.stdout) == (0, "note: kernels: reference (pure torch): there is no compiler\n")


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    chat_command._show(Piece("a\x1b[31mb\nc\x07", last=True))
    assert capsys.readouterr().out == "a\ufffd[31mb\nc\ufffd"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_the_answers_under_way(
    run: RunFolder, tmp_path: Path, signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, work, stop = threading.Event(), Scheduler.work, Engine.stop
    monkeypatch.setattr(Scheduler, "work", lambda self: (self.running and gate.wait(WAIT_S), work(self))[1])
    monkeypatch.setattr(Engine, "stop", lambda self: (stop(self), gate.set()))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    address, ended = f"http://127.0.0.1:{port}", []

    def ask() -> None:
        body = {"model": "tiny_random", "prompt": "abc", "max_tokens": 500, "temperature": 0, "stream": True}
        client = httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=WAIT_S)
        with client.stream("POST", f"{address}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(os.getpid(), signum)
            ended.append(list(lines)[-2])

    asking = threading.Thread(target=ask)
    asking.start()
    done = call("qlora_lab.serve", f"run={run.path}", f"port={port}", f"paths.cache_dir={tmp_path}", cwd=tmp_path)
    asking.join()
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n{run.run_id}\nserving at {address}/v1" in done.stdout and done.stdout.endswith("stopped\n")
    assert "the server stopped before the answer was whole" in ended[0]


def test_two_servers_on_one_port_and_other_refusals(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*words: str) -> str:
        done = call("qlora_lab.serve", f"paths.cache_dir={tmp_path}", *words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(*TINY, f"port={port}")
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; try another port" in said
    assert "set the environment variable QLORA_LAB_TOKEN" in refusal(*TINY, "host=0.0.0.0", "port=0")
    said = refusal(*TINY, "cache_budget_mb=0.005", "port=0")
    assert "must hold at least 16 tokens of tiny_random in nf4, 0.008192 MB; 0.005 MB hold 9" in said
    monkeypatch.setenv("QLORA_LAB_TOKEN", "short")
    assert "must be at least 16 ASCII characters" in refusal(*TINY, "port=0")
    monkeypatch.delenv("QLORA_LAB_TOKEN")
    assert "say what to open: run=ID, study=NAME, or model=NAME" in refusal("port=0")
    folder = f"+adapters.x={adapters['a']}"
    assert "folders and hub ids do not say how their base is loaded" in refusal(folder, "port=0")
    other = ("model=tiny_random", "model.name=other", *TINY[1:])
    assert "is for the base 'tiny_random', and this one is 'other'" in refusal(*other, folder, "port=0")
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        said = refusal("model=tiny_random", "quant=nf4", "device=cuda", "port=0")
    assert "torch sees none here; for the CPU name the base, as in model=tiny_random quant=nf4 device=cpu" in said
    gone = refusal("model=folder", f"model.path={tmp_path}/gone", "model.max_length_tokens=64", "port=0")
    assert "does not exist" in gone
    monkeypatch.setattr(serve_command, "PACKAGES", ("json", "no_such_package"))
    assert "the server needs no_such_package; install them with `pip install 'qlora_lab[serve]'`" in refusal(*TINY)
