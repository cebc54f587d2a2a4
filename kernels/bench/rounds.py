"""Measuring implementations of the same work in turns.

One process; the implementations take turns, round by round, so that a noisy machine disturbs all of them. A figure is
the median over rounds, a ratio the median of the per-round ratios (theirs / ours: above 1, ours is faster).

Before a cell is timed, its implementations are called once, and the run stops if one of them does not return what is
expected (checks.py); the JSON has the errors found.

`--cpu-time` counts what the process computed, on one thread: for a machine on which others compute too.

A cell has two floors: the time in which a loop that does nothing else reads and writes its bytes, in memory of the same
size (so in the same cache), and the time of its operations in a loop of nothing but multiply-adds (ceilings.py). Both
loops run in every round before and after ours, for as long as an implementation at least, and their best call counts;
the share of the floor is the median of the per-round shares of the longer one. `ratio_at_floor` is what the other
implementations take over that floor: the most that a kernel could reach. table.py prints the JSON as a table; where
ours takes less time than the floor by more than two loops differ, it says that the floor is none.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ceilings import Ceilings
from checks import Expected, check
from table import share_of_floor

from qlora_lab.config.hardware import detect
from qlora_lab.ops.registry import KERNELS
from qlora_lab.runs.environment import measured_commit

SHORTEST_ROUND_S = 0.01  # an implementation is called until this is over, and counted per call
PACKAGES = ("torch", "bitsandbytes", "torchao")
Clock = Callable[[], float]


@dataclass
class Cell:
    """One line of the table: the same work, by name of the implementation; one of them is `ours`.

    Attributes:
        read, written: the fewest bytes that have to be.
        flops: the fewest operations, a multiply-add being two.
        in_place: what is written is part of what was read.
        dtype: of the operands that are multiplied, "fp32" or "bf16".
        expected: what the work returns; None where there is nothing to compare it with.
    """

    name: str
    work: dict[str, Callable[[], Any]]
    read: int = 0
    written: int = 0
    flops: int = 0
    in_place: bool = False
    dtype: str = "fp32"
    expected: Expected | None = None


def time_calls(work: Callable[[], Any], clock: Clock) -> float:
    """Return the seconds of one call, over as many as fill the shortest round."""
    calls, started = 0, clock()
    while True:
        work()
        calls += 1
        elapsed = clock() - started
        if elapsed >= SHORTEST_ROUND_S:
            return elapsed / calls


def best_call(work: Callable[[], Any], clock: Clock) -> float:
    """Return the seconds of the fastest of as many calls as fill the shortest round."""
    best, started = float("inf"), clock()
    while (begun := clock()) - started < SHORTEST_ROUND_S:
        work()
        best = min(best, clock() - begun)
    return best


class Floors:
    """The two floors of one cell, measured when asked."""

    def __init__(self, cell: Cell, ceilings: Ceilings, clock: Clock) -> None:
        self._flops, self._clock = cell.flops, clock
        self._multiply = partial(ceilings.flops, cell.dtype)
        moved = cell.read + cell.written
        self._moves = ceilings.bytes(cell.read, cell.written, cell.in_place) if moved else ()

    def measure(self) -> dict[str, float]:
        """Return the seconds of the bytes and of the operations; 0 for what the cell has none of."""
        moving = min((best_call(move, self._clock) for move in self._moves), default=0.0)
        if not self._flops:
            return {"bytes": moving, "operations": 0.0}
        return {"bytes": moving, "operations": self._flops / self._multiply() * best_call(self._multiply, self._clock)}

    def around(self, measured: Callable[[], float]) -> tuple[float, dict[str, float]]:
        """Return what `measured` returns, and the floors at their best before and after it."""
        before = self.measure()
        took = measured()
        after = self.measure()
        return took, {name: min(before[name], after[name]) for name in before}


def measure(cell: Cell, rounds: int, ceilings: Ceilings, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Check one cell and return its medians: milliseconds by implementation, ratios to ours, floors, share of them."""
    checked = check(cell.name, cell.work, cell.expected) if cell.expected else None
    seconds: dict[str, list[float]] = {name: [] for name in cell.work}
    floors: list[dict[str, float]] = []
    cell_floors = Floors(cell, ceilings, clock)
    for _ in range(rounds + 1):
        for name, work in cell.work.items():
            if name == "ours":
                took, floor = cell_floors.around(partial(time_calls, work, clock))
                floors.append(floor)
            else:
                took = time_calls(work, clock)
            seconds[name].append(took)
    for values in (floors, *seconds.values()):
        del values[0]  # the first round warms up
    ours = seconds.pop("ours")
    longest = [max(floor.values()) for floor in floors]
    return {
        "cell": cell.name,
        "checked": checked,
        "read_bytes": cell.read,
        "written_bytes": cell.written,
        "flops": cell.flops,
        "ms": {name: milliseconds(values) for name, values in {"ours": ours, **seconds}.items()},
        "floor_ms": {name: milliseconds([floor[name] for floor in floors]) for name in floors[0]},
        "share_of_floor": median_ratio(longest, ours) if any(longest) else None,
        "ratio": {name: median_ratio(values, ours) for name, values in seconds.items()},
        "ratio_at_floor": {name: median_ratio(values, longest) for name, values in seconds.items() if any(longest)},
    }


def milliseconds(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 4)


def median_ratio(values: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(values, others, strict=True)), 3)


def main(description: str, cells: Callable[[str], Iterator[Cell]]) -> None:
    """Run a benchmark from its command line: `cells` yields those whose name contains a text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count the process's own time, on one thread")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if KERNELS.library is None:
        sys.exit(f"there is nothing to measure: {KERNELS}")
    if options.cpu_time:
        options.threads = 1
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "machine": f"{detect().cpu_model}, {options.threads} threads",
        "kernels": str(KERNELS),
        "commit": measured_commit(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "rounds": options.rounds,
        "clock": "process" if options.cpu_time else "wall",
        "cells": [],
    }
    print(f"{results['kernels']} on {results['machine']}; {results['packages']}")
    ceilings = Ceilings(options.threads)
    for cell in cells(options.only):
        result = measure(cell, options.rounds, ceilings, clock)
        results["cells"].append(result)
        print(line(result), flush=True)
        if options.json:  # after every cell: a matrix takes long, and may be stopped
            options.json.write_text(json.dumps(results, indent=1) + "\n")


def line(result: dict[str, Any]) -> str:
    """Return a cell's figures in one line."""
    floor = f"{share_of_floor(result):<18}"
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in result["ratio"].items())
    return f"{result['cell']:<44} {result['ms']['ours']:>9.3f} ms  {floor}   {ratios}"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
