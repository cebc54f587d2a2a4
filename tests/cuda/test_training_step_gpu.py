"""The three sides of the benchmark of a training step learn the same thing, here on a tiny model on a CPU."""

import json
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.cuda.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    load_script("memory_proof")  # which it imports as its neighbour
    return load_script("training_step_gpu")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
@pytest.mark.parametrize("side", ["ours", "dense", "peft"])
def test_every_side_trains(script: ModuleType, side: str) -> None:
    for package in script.NEEDS[side]:
        pytest.importorskip(package)
    shape = script.Shape(64, 160, layers=2, heads=2, vocabulary=100)
    size = {"rows": 2, "tokens": 24, "device": torch.device("cpu"), "dtype": torch.float32}
    result = script.measure(side, shape, **size, steps=5)
    assert result["losses"][0] == pytest.approx(4.605, abs=0.1)  # of a guess among 100
    assert result["losses"][-1] < result["losses"][0]
    assert result["tokens_per_s"] > 0


def test_a_side_that_fails_leaves_the_others(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"ours": 120.0, "dense": 100.0}

    def run(command: list[str], **options: object) -> SimpleNamespace:
        side = command[command.index("--side") + 1]
        if side not in speeds:
            return SimpleNamespace(returncode=1, stdout="", stderr="no such symbol")
        printed = "a warning\n" + json.dumps({"tokens_per_s": speeds[side]}) + "\n"
        return SimpleNamespace(returncode=0, stdout=printed, stderr="")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "find_spec", lambda name: name)
    *_, result = script.in_turn(Namespace(shape="7b", rows=4, tokens=512, rounds=2))
    assert result["ratios"] == {"ours/dense": 1.2} and len(result["rounds"]) == 2
    assert result["left_out"] == {"peft": "exit status 1: no such symbol"}
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    *_, result = script.in_turn(Namespace(shape="7b", rows=4, tokens=512, rounds=1))
    assert result["left_out"] == {"peft": "there is no peft and no bitsandbytes"}
