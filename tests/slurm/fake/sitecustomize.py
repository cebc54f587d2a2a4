"""Stands in for qlora_lab.run in the jobs of tests that are about the machinery: steps that only sleep.

Python imports this module by itself where this folder is on PYTHONPATH. The run's folder may hold `fake.json`:
{"steps": 5, "step_s": 0.2, "fail": "message", "die": attempts that kill themselves, "nodes": those where it fails,
"memory_mb": to hold}. A run that has a config.yaml is a real one, and trained.
"""

import importlib
import json
import os
import signal
import sys
import time
import types
from pathlib import Path


def execute(path, attempts_before=None, *, lease, stop_cause, bases=None, config=None):
    from qlora_lab.errors import LeaseLostError
    from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, MetricsFile, RunFolder

    folder = RunFolder(Path(path))
    if folder.config_file.exists():
        for name in STANDING_IN:
            del sys.modules[name]
        run = importlib.import_module("qlora_lab.run")
        return run.execute(path, attempts_before, lease=lease, stop_cause=stop_cause)
    file = folder.path / "fake.json"
    told = {"steps": 5, "step_s": 0.1, "fail": None, "die": 0, "nodes": [], "memory_mb": 0}
    if file.exists():
        told |= json.loads(file.read_text())
    stop = []
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, lambda number, frame: stop.append(number))
    with folder.holding(lease):
        try:
            folder.begin()
            held = b"x" * (told["memory_mb"] << 20)
            metrics = MetricsFile(folder, lambda: 1.0)
            done = (folder.last_metrics() or {"step": 0})["step"]
            for step in range(done + 1, told["steps"] + 1):
                time.sleep(told["step_s"])
                metrics.append(step, {"attempt": lease.attempt})
                if lease.attempt <= told["die"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                if told["fail"] and (not told["nodes"] or os.environ["SLURMD_NODENAME"] in told["nodes"]):
                    folder.end(FAILED, 1.0, ValueError(told["fail"]))
                    return FAILED
                if stop:
                    folder.end(INTERRUPTED, 1.0, cause=stop_cause())
                    return INTERRUPTED
            folder.write_result({"attempt": lease.attempt, "signals": len(stop), "held": len(held)})
            folder.end(FINISHED, 1.0)
        except LeaseLostError:
            return "lost"
        except OSError as error:
            folder.end(FAILED, 1.0, error)
            return FAILED
    return FINISHED


STANDING_IN = {"qlora_lab.run": {"execute": execute}, "qlora_lab.models.warm": {"WarmBase": object}}  # without torch
for name, contents in STANDING_IN.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(contents)
