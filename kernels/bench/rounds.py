"""Measuring implementations of the same work in turns.

One process; the implementations take turns, round by round, so that a noisy machine disturbs all of them. A figure is
the median over rounds, a ratio the median of the per-round ratios (theirs / ours: above 1, ours is faster).

`--cpu-time` counts what the process computed, on one thread: for a machine on which others compute too.

The floor of a cell is the time its bytes take at the rate of a large copy, or its operations at the peak rate of
multiply-adds, whichever is longer, both measured in the same run; what stays in a cache can be faster. table.py prints
the JSON as a table.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ceilings import copy_bytes_per_s, peak_flops_per_s

from qlora_lab.config.hardware import detect
from qlora_lab.ops.registry import KERNELS

SHORTEST_ROUND_S = 0.01  # an implementation is called until this is over, and counted per call
PACKAGES = ("torch", "bitsandbytes", "torchao")


@dataclass
class Cell:
    """One line of the table: the same work, by name of the implementation; one of them is `ours`.

    Attributes:
        bytes: the least that has to be read and written.
        flops: the least operations, a multiply-add being two.
    """

    name: str
    work: dict[str, Callable[[], Any]]
    bytes: int = 0
    flops: int = 0


def time_calls(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Return the seconds of one call, over as many as fill the shortest round."""
    calls, started = 0, clock()
    while True:
        work()
        calls += 1
        elapsed = clock() - started
        if elapsed >= SHORTEST_ROUND_S:
            return elapsed / calls


def floor_ms(cell: Cell, ceilings: dict[str, float | None]) -> float:
    """Return the milliseconds that no implementation can beat from memory."""
    copy, peak = ceilings["copy_bytes_per_s"], ceilings["peak_flops_per_s"]
    return 1e3 * max(cell.bytes / copy if copy else 0.0, cell.flops / peak if peak else 0.0)


def measure(
    cell: Cell, rounds: int, ceilings: dict[str, float | None], clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Return the medians of one cell: milliseconds by implementation, ratios to ours, and its floor."""
    seconds: dict[str, list[float]] = {name: [] for name in cell.work}
    for number in range(rounds + 1):
        for name, work in cell.work.items():
            took = time_calls(work, clock)
            if number:  # the first round warms up
                seconds[name].append(took)
    ours, floor = seconds["ours"], floor_ms(cell, ceilings)
    return {
        "cell": cell.name,
        "bytes": cell.bytes,
        "flops": cell.flops,
        "floor_ms": round(floor, 4),
        "share_of_floor": round(floor / (1e3 * statistics.median(ours)), 3),
        "ms": {name: round(1e3 * statistics.median(values), 4) for name, values in seconds.items()},
        "ratio": {
            name: round(statistics.median(theirs / mine for theirs, mine in zip(values, ours, strict=True)), 3)
            for name, values in seconds.items()
            if name != "ours"
        },
    }


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
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "rounds": options.rounds,
        "clock": "process" if options.cpu_time else "wall",
        "ceilings": {
            "copy_bytes_per_s": copy_bytes_per_s(),
            "peak_flops_per_s": peak_flops_per_s(options.threads),
        },
        "cells": [],
    }
    print(f"{results['kernels']} on {results['machine']}; {results['packages']}")
    for cell in cells(options.only):
        result = measure(cell, options.rounds, results["ceilings"], clock)
        results["cells"].append(result)
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in result["ratio"].items())
        share = f"{100 * result['share_of_floor']:>4.0f} %"
        print(f"{cell.name:<40} {result['ms']['ours']:>9.3f} ms  {share} of the floor   {ratios}", flush=True)
        if options.json:  # after every cell: a matrix takes long, and may be stopped
            options.json.write_text(json.dumps(results, indent=1) + "\n")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
