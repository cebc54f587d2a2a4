"""Stands in for qlora_lab.run in the jobs of tests that are about the machinery: steps that only sleep.

Python imports this module by itself where this folder is on PYTHONPATH. The run's folder may hold `fake.json`:
{"steps": 5, "step_s": 0.2, "fail": "message", "die": attempts that kill themselves, "nodes": those where it fails,
"memory_mb": to hold}. A run that has a config.yaml is a real one, and trained, unless FAKE_RUNS is set.

Each line of `writers.jsonl` is a moment at which an attempt still had its run, by the clock that all nodes of the tests
share: it was taken before a write that was not refused.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import types
from pathlib import Path


def execute(path, attempts_before=None, *, lease, stop_cause, bases=None, config=None):
    from qlora_lab.runs.folder import RunFolder

    folder = RunFolder(Path(path))
    if folder.config_file.exists() and not os.environ.get("FAKE_RUNS"):
        return trained(path, attempts_before, lease, stop_cause)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        return slept(folder, lease, stop_cause)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def witness(folder, lease, moment):
    with (folder.path / "writers.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": lease.attempt, "pid": os.getpid(), "at": moment}) + "\n")


def trained(path, attempts_before, lease, stop_cause):
    """Execute a real run; the stand-ins come back for those that this process takes after it."""
    from qlora_lab.runs.folder import RunFolder
    from qlora_lab.runs.metrics_file import MetricsFile

    class Witnessed(MetricsFile):
        def append(self, step, metrics):
            moment = time.monotonic()
            line = super().append(step, metrics)
            with contextlib.suppress(OSError):  # on a full disk
                witness(RunFolder(Path(path)), lease, moment)
            return line

    for name in STANDING_IN:
        del sys.modules[name]
    try:
        run = REAL.get("run") or importlib.import_module("qlora_lab.run")
        REAL["run"] = run
        run.MetricsFile = Witnessed
        return run.execute(path, attempts_before, lease=lease, stop_cause=stop_cause)
    finally:
        stand_in()


def slept(folder, lease, stop_cause):
    from qlora_lab.errors import LeaseLostError
    from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED
    from qlora_lab.runs.metrics_file import MetricsFile

    file = folder.path / "fake.json"
    told = {"steps": 5, "step_s": 0.1, "fail": None, "die": 0, "nodes": [], "memory_mb": 0}
    if file.exists():
        told |= json.loads(file.read_text())
    stop = []
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, lambda number, frame: stop.append(number))

    def still_ours(write, *given):
        moment = time.monotonic()
        write(*given)
        witness(folder, lease, moment)

    with folder.holding(lease):
        try:
            still_ours(folder.begin)
            held = b"x" * (told["memory_mb"] << 20)
            metrics = MetricsFile(folder, lambda: 1.0)
            done = (folder.last_metrics() or {"step": 0})["step"]
            for step in range(done + 1, told["steps"] + 1):
                time.sleep(told["step_s"])
                still_ours(metrics.append, step, {"attempt": lease.attempt})
                if lease.attempt <= told["die"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                if told["fail"] and (not told["nodes"] or os.environ["SLURMD_NODENAME"] in told["nodes"]):
                    folder.end(FAILED, 1.0, ValueError(told["fail"]))
                    return FAILED
                if stop:
                    folder.end(INTERRUPTED, 1.0, cause=stop_cause())
                    return INTERRUPTED
            folder.write_environment({"cpu": "none"})
            still_ours(
                folder.write_result,
                {"attempt": lease.attempt, "signals": len(stop), "held": len(held), "metrics": METRICS},
            )
            folder.end(FINISHED, 1.0)
        except LeaseLostError:
            return "lost"
        except OSError as error:
            folder.end(FAILED, 1.0, error)
            return FAILED
    return FINISHED


METRICS = {"eval/loss": 1.0, "eval/bits_per_byte": 1.0, "eval/target_tokens": 10, "eval/rows": 8, "train/steps": 30}
STANDING_IN = {"qlora_lab.run": {"execute": execute}, "qlora_lab.models.warm": {"WarmBase": object}}  # without torch
REAL = {}  # qlora_lab.run, once a real run has needed it


def stand_in():
    for name, contents in STANDING_IN.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(contents)


stand_in()
