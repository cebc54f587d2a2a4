"""`make gpu-check` goes on after a failure, keeps to its time, and says why it left something out."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_lab.ops.registry import CUDA_KERNELS
from tests.cuda.scripts import FOLDER, load_script


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    load_script("gpu_steps")  # which it imports as its neighbour
    return load_script("gpu_check")


class FakeMachine:
    """Runs nothing: every command takes `seconds`, ends as `endings` says, and writes `written` into its file."""

    def __init__(
        self, seconds: float, endings: dict[str, int], writes: dict[str, Path] | None = None, written: str = '{"a": 1}'
    ) -> None:
        self.seconds, self.endings, self.writes, self.written = seconds, endings, writes or {}, written
        self.now = 0.0
        self.limits: list[float] = []
        self.kept: list[Any] = []

    def run(self, command: Sequence[str], environment: dict[str, str], limit_s: float) -> tuple[int, str]:
        self.limits.append(limit_s)
        self.now += self.seconds
        if command[0] in self.writes:
            self.writes[command[0]].write_text(self.written)
        return self.endings.get(command[0], 0), f"much before\n{command[0]} said this\n"

    def clock(self) -> float:
        return self.now


def run(gpu_check: ModuleType, machine: FakeMachine, steps: list, budget_s: float = 100.0) -> list:  # type: ignore[type-arg]
    context = gpu_check.Context(Path("build"), "python")
    return gpu_check.run_steps(steps, context, budget_s, machine.run, machine.clock, machine.kept.append)


def test_a_failed_step_does_not_stop_the_others(gpu_check: ModuleType, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("1")
    steps = [
        gpu_check.Step("bad", lambda context: [["bad"], ["never"]], old),
        gpu_check.Step("good", lambda context: [["good"]], new),
    ]
    machine = FakeMachine(1.0, {"bad": 3}, writes={"good": new})
    bad, good = run(gpu_check, machine, steps)
    assert bad.results is None  # what an earlier check left
    assert (bad.status, bad.seconds) == ("failed", 1.0)
    assert bad.reason == "bad: exit status 3\nmuch before\nbad said this"
    assert (good.status, good.said, good.results) == ("passed", "good said this", {"a": 1})


@pytest.mark.parametrize(("ending", "reason"), [(1, "the build failed"), (None, "the build was left out")])
def test_without_a_build_nothing_else_stands_in_for_it(gpu_check: ModuleType, ending: int | None, reason: str) -> None:
    """Neither the references nor kernels of an earlier build: tests of those are skipped, which would pass."""

    def build(context: Any) -> list[list[str]]:
        if ending is None:
            raise gpu_check.CannotRunError("there is no nvcc on this machine")
        return [["nvcc"]]

    steps = [
        gpu_check.Step("build", build, needs_kernels=False),
        gpu_check.Step("tests", lambda context: [["pytest"]]),
        gpu_check.Step("others", lambda context: [["pytest"]], needs_kernels=False),
    ]
    _, tests, others = run(gpu_check, FakeMachine(1.0, {"nvcc": ending or 0}), steps)
    assert (tests.status, tests.reason) == ("left out", reason)
    assert others.status == "passed"


def test_kernels_that_do_not_load_are_no_build(gpu_check: ModuleType) -> None:
    status, printed = gpu_check.run_command([sys.executable, "-c", sys.modules["gpu_steps"].LOAD], {}, 60.0)
    if CUDA_KERNELS.library is None:
        assert status == 1 and printed.startswith("reference (pure torch): ")
    else:
        assert status == 0 and printed.startswith("native CUDA")


def test_results_of_a_step_that_was_stopped_while_it_wrote_them(gpu_check: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "cells.json"
    machine = FakeMachine(1.0, {"slow": 124}, writes={"slow": file}, written='{"cells": [')
    steps = [gpu_check.Step("slow", lambda context: [["slow"]], file), gpu_check.Step("next", lambda context: [["x"]])]
    slow, following = run(gpu_check, machine, steps)
    assert (slow.status, slow.results) == ("failed", None)
    assert following.status == "passed"


def test_a_step_without_its_tool_is_left_out_with_the_reason(gpu_check: ModuleType) -> None:
    step = gpu_check.Step("watch", lambda context: [[sys.modules["gpu_steps"].needs("no-such-tool-anywhere")]])
    (outcome,) = run(gpu_check, FakeMachine(1.0, {}), [step])
    assert (outcome.status, outcome.reason) == ("left out", "there is no no-such-tool-anywhere on this machine")


def test_a_tool_is_also_found_beside_this_python(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As pip installs cmake into an environment that nobody has activated."""
    tool = tmp_path / "cmake-of-an-environment"
    tool.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert sys.modules["gpu_steps"].needs(tool.name) == str(tool)


def test_a_tool_that_refuses_the_machine_is_no_failure(gpu_check: ModuleType) -> None:
    steps = [gpu_check.Step("watch", lambda context: [["watch"]], refusals=(said,)) for said in ("said this", "no GPU")]
    refused, failed = run(gpu_check, FakeMachine(1.0, {"watch": 9}), steps)
    assert (refused.status, refused.reason) == ("left out", "watch says here: said this")
    assert failed.status == "failed"
    (passed,) = run(gpu_check, FakeMachine(1.0, {}), steps[:1])
    assert passed.status == "passed"


def test_outcomes_are_kept_after_every_step(gpu_check: ModuleType) -> None:
    machine = FakeMachine(1.0, {})
    outcomes = run(gpu_check, machine, [gpu_check.Step(str(number), lambda context: [["x"]]) for number in range(3)])
    assert len(machine.kept) == 3 and machine.kept[-1] == outcomes


def test_steps_share_the_time(gpu_check: ModuleType) -> None:
    machine = FakeMachine(40.0, {})
    steps = [gpu_check.Step(str(number), lambda context: [["x"]]) for number in range(4)]
    outcomes = run(gpu_check, machine, steps)
    assert machine.limits == [100.0, 60.0, 20.0]
    assert [outcome.status for outcome in outcomes] == ["passed"] * 3 + ["left out"]
    assert outcomes[3].reason == "no time left of 100 s"


def test_a_step_that_hangs_leaves_the_others_their_time(gpu_check: ModuleType) -> None:
    machine = FakeMachine(5.0, {})
    run(gpu_check, machine, [gpu_check.Step("short", lambda context: [["x"]], limit_s=30.0)])
    assert machine.limits == [30.0]


def test_a_command_that_takes_too_long_is_stopped(gpu_check: ModuleType) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(30)"]
    status, printed = gpu_check.run_command(command, {}, 1.0)
    assert status == 124
    assert "begun" in printed and "stopped after 1 s" in printed
    assert gpu_check.run_command(["no-such-command"], {}, 1.0)[0] == 127


def test_a_check_that_is_interrupted_leaves_no_command_behind(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[str]] = []
    communicate = subprocess.Popen.communicate

    def interrupted(process: subprocess.Popen[str], timeout: float | None = None) -> Any:
        if not begun:
            begun.append(process)
            raise KeyboardInterrupt
        return communicate(process, timeout=timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_command([sys.executable, "-c", "import time; time.sleep(60)"], {}, 100.0)
    assert begun[0].returncode == -signal.SIGKILL


def test_without_a_gpu_nothing_is_checked_and_it_is_said(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out.json")])
    assert gpu_check.main() == 2
    assert "nothing was checked: torch finds no GPU that it can use" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("of_git", "commit"), [(None, "given"), ("found", "found+changes")])
def test_the_commit_is_git_s_or_in_a_mere_copy_the_given_one(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, of_git: str | None, commit: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu_check, "printed_by", lambda *command: of_git)
    assert gpu_check.machine("given")["commit"] == commit


def test_every_step_names_its_commands(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["gpu_steps"], "needs", lambda tool: tool)
    (tmp_path / "libqlk_cuda.so").touch()
    context = gpu_check.Context(tmp_path, "python", "90a-real")
    commands = {step.name: step.commands(context) for step in gpu_check.all_steps(tmp_path)}
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in commands["build"][0]
    assert commands["build"][-1][:2] == ["python", "-c"] and "CUDA_KERNELS" in commands["build"][-1][2]
    assert commands["tests"][0][-3:] == ["-m", "gpu", "tests/cuda"]
    assert commands["compute-sanitizer racecheck"][1][:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert commands["memory 65b --tokens 2048"][0][2:7] == ["65b", "--cap-gib", "48", "--tokens", "2048"]
    assert commands["benchmark"][0][1] == "kernels/bench/cuda_ops.py"
    for words in (words for listed in commands.values() for words in listed):
        for word in words:
            if word.startswith(("kernels/", "tests/")):
                assert (FOLDER.parents[1] / word).exists(), word


def test_what_the_sanitizers_watch_is_compiled_once(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = sys.modules["gpu_steps"]
    monkeypatch.setattr(steps, "needs", lambda tool: tool)
    library, program, context = tmp_path / "libqlk_cuda.so", tmp_path / "memory_check", gpu_check.Context(tmp_path, "")
    library.touch()
    os.utime(library, (1000, 1000))
    first = steps.sanitizer("memcheck")(context)
    program.touch()
    second = steps.sanitizer("racecheck")(context)
    os.utime(program, (999, 999))
    of_a_new_library = steps.sanitizer("racecheck")(context)
    assert [[command[0] for command in commands] for commands in (first, second, of_a_new_library)] == [
        ["nvcc", "compute-sanitizer"],
        ["compute-sanitizer"],
        ["nvcc", "compute-sanitizer"],
    ]


def test_some_steps_can_be_asked_for(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Their JSON has a name of its own beside that of the whole check."""
    found = {"gpu": "NVIDIA H200", "commit": "1234567890abcdef", "capability": "90"}
    monkeypatch.setattr(gpu_check, "machine", lambda commit: found)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    ran: list[str] = []

    def run_steps(steps: list[Any], context: Any, budget_s: float, keep: Any) -> list[Any]:
        ran.extend(step.name for step in steps)
        assert 0 < budget_s < gpu_check.BUDGET_S  # looking at the machine has taken some of it
        assert context.environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"
        assert context.capability == "90a-real" and context.environment["HF_HUB_OFFLINE"] == "1"
        outcomes = [gpu_check.Outcome(step.name, "passed", 1.0) for step in steps]
        keep(outcomes)
        return outcomes

    monkeypatch.setattr(gpu_check, "run_steps", run_steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "memory 65b", "--build", str(tmp_path / "build")])
    assert gpu_check.main() == 0
    assert ran == ["build", "memory 65b", "memory 65b --optim paged_adamw_8bit", "memory 65b --tokens 2048"]
    written = tmp_path / "kernels" / "bench" / "results" / "NVIDIA-H200-1234567890-memory-65b.json"
    assert json.loads(written.read_text())["machine"] == found
    assert str(written) in capsys.readouterr().out
