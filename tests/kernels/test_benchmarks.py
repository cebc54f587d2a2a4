"""What kernels/bench measures is checked before it is timed, and its floors move the bytes that they say."""

import ctypes
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_lab.ops.registry import KERNELS

FOLDER = Path(__file__).parents[2] / "kernels" / "bench"
LINE = 64
TINY = {
    "cpu_ops": {"SHAPES": ((96, 128),), "ROWS": (1, 5), "TRAINING_ROWS": 20},
    "cpu_head": {"HEADS": ((300, 64),), "ROWS": (1, 5)},
    "cpu_attention": {"SHAPES": ((2, 4, 2, 19, 32),)},
    "cpu_adamw": {"CASES": {"two tensors": [(40, 128), (3, 7)]}},
    "cpu_calls": {},
}
native = pytest.mark.skipif(KERNELS.library is None, reason="no native kernels")


@pytest.fixture(autouse=True)
def scripts_find_each_other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in {"rounds", "checks", "table", "ceilings", *TINY} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def rounds() -> ModuleType:
    return importlib.import_module("rounds")


def product_cell(rounds: ModuleType, ours: Any, tolerance: float = 1e-3) -> Any:
    expected = rounds.Expected(lambda: torch.tensor([1.0, -2.0]), {"ours": tolerance, "not there": 0.0})
    return rounds.Cell("fp32 2x1 product", {"ours": lambda: ours, "theirs": lambda: None}, expected=expected)


@pytest.mark.parametrize(
    ("ours", "tolerance", "words"),
    [
        ([1.0, -2.1], 1e-3, "off by 0.05 of the largest magnitude, at most 0.001 is allowed"),
        ([1.0, float("nan")], 1e-3, "off by inf"),
        ([1.0, -2.0, 0.0], 1e-3, "shapes"),
        ([1.0, -2.0 - 3e-7], 0.0, "equal bytes are expected"),
    ],
)
def test_a_wrong_result_stops_the_run_and_names_the_cell(
    rounds: ModuleType, monkeypatch: pytest.MonkeyPatch, ours: list[float], tolerance: float, words: str
) -> None:
    timed: list[Any] = []
    monkeypatch.setattr(rounds, "time_calls", lambda *call: timed.append(call))
    with pytest.raises(SystemExit, match=f"^fp32 2x1 product: ours .*{words}.*; not timed$"):
        rounds.measure(product_cell(rounds, torch.tensor(ours), tolerance), 1, SimpleNamespace(flops=len))
    assert not timed


def test_equal_bytes_are_of_one_dtype_and_sign(rounds: ModuleType) -> None:
    for ours in (torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([1.0, -2.0]).bfloat16()):
        with pytest.raises(SystemExit, match="equal bytes are expected"):
            rounds.measure(product_cell(rounds, ours, 0.0), 1, SimpleNamespace(flops=len))


def test_a_result_file_tells_the_commit_and_what_was_checked(
    rounds: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rounds, "Ceilings", lambda threads: SimpleNamespace(flops=len))
    monkeypatch.setattr(rounds, "KERNELS", SimpleNamespace(library=object()))
    monkeypatch.setattr(rounds, "SHORTEST_ROUND_S", 0.0)
    monkeypatch.setattr(rounds, "measured_commit", lambda: "0123abc+changes")
    file = tmp_path / "found.json"
    monkeypatch.setattr(
        sys, "argv", ["bench", "--rounds", "1", "--json", str(file), "--threads", str(torch.get_num_threads())]
    )
    rounds.main("", lambda wanted: iter([product_cell(rounds, torch.tensor([1.0, -2.0]))]))
    found = json.loads(file.read_text())
    assert found["commit"] == "0123abc+changes"
    assert found["cells"][0]["checked"] == {"ours": {"largest_error": 0.0, "tolerance": 1e-3}}


def test_a_training_step_file_tells_the_commit() -> None:
    from qlora_lab.runs.environment import measured_commit
    from tests.benchmarks.training_step import record

    assert record([], "float32")["commit"] == measured_commit()


def test_a_floor_that_ours_is_faster_than_is_none() -> None:
    table = importlib.import_module("table")
    cell = {"ms": {"ours": 2.0}, "ratio": {"torch": 3.0}, "floor_ms": {"bytes": 2.1, "operations": 0.1}}
    assert table.entry({**cell, "share_of_floor": 1.05}, ["torch"]) == "2 (3; 105 % b)"
    assert table.entry({**cell, "share_of_floor": 1.21}, ["torch"]) == "2 (3; floor not valid)"
    assert table.entry({**cell, "share_of_floor": None}, ["torch"]) == "2 (3)"


@native
@pytest.mark.parametrize("script", TINY)
def test_every_cell_returns_what_is_expected(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    module, checks = importlib.import_module(script), importlib.import_module("checks")
    for name, value in TINY[script].items():
        monkeypatch.setattr(module, name, value)
    torch.manual_seed(0)
    compared = [cell for cell in module.cells("") if cell.expected or script != "cpu_calls"]
    assert compared
    for cell in compared:
        assert "ours" in checks.check(cell.name, cell.work, cell.expected)
        wrong = {"ours": lambda work=cell.work["ours"]: [0.5 * part for part in checks.tensors(work())]}
        with pytest.raises(SystemExit, match=f"^{re.escape(cell.name)}: ours"):
            checks.check(cell.name, wrong, cell.expected)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        found = importlib.import_module("ceilings").Ceilings(2)._library
    found.move.restype = ctypes.c_int64
    return found


@pytest.mark.parametrize("past_caches", [0, 1])
@pytest.mark.parametrize("reading", [(1, 0), (4, 0), (1, 1)], ids=["one stream", "four streams", "prefetch"])
@pytest.mark.parametrize(("read", "written"), [(40, 0), (400, 36), (36, 400)])
def test_a_floor_moves_its_bytes(
    library: ctypes.CDLL, read: int, written: int, reading: tuple[int, int], past_caches: int
) -> None:
    source, target = (torch.full((lines + 1, LINE // 8), 2) for lines in (read, written))
    sizes = (source.data_ptr(), read * LINE, target.data_ptr(), written * LINE)
    total = library.move(*sizes, *reading, past_caches, 2)
    assert total in (2 * read, 4 * read)  # one word of each vector of 64 or 32 bytes
    assert (source == 2).all() and (target[:written] < 2).all() and (target[written:] == 2).all()


@pytest.mark.parametrize("streams", [1, 4])
def test_a_floor_in_place_writes_some_of_what_it_read(library: ctypes.CDLL, streams: int) -> None:
    memory = torch.full((401, LINE // 8), 2)
    library.move(memory.data_ptr(), 400 * LINE, None, 300 * LINE, streams, 0, 0, 2)
    assert int((memory < 2).all(dim=1).sum()) == 300 and (memory[400] == 2).all()
