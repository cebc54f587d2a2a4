"""The batch script of a chunk.

submitit, which launches local runs here, would write a pickle for each task and rename all of them once the array has
its id: two files a run, and a launcher that is killed in between leaves tasks that find nothing. A chunk is one file,
complete before sbatch hears of it, and a task needs no more than its number.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.sweep.chunk import POOL, Chunk

COMMENT = "qlora_lab"
WARNING_S = 120  # how long before its time limit a task is told; SLURM may be up to a minute early


def comment_of(nonce: str) -> str:
    return f"{COMMENT} {nonce}"


def nonce_of(comment: str) -> str | None:
    """Return what `comment_of` was given; None for a job of somebody else."""
    name, _, nonce = comment.partition(" ")
    return nonce if name == COMMENT and nonce else None


def warning_s(limit_min: int) -> int:
    return min(WARNING_S, limit_min * 60 // 3)


def batch_script(
    chunk: Chunk,
    study: str,
    *,
    parallel: int | None,
    after: str | None,
    exclude: Sequence[str],
) -> str:
    """Return the text to hand to sbatch.

    The worker takes the place of the shell, so that signals and the exit status are its own, without srun.

    Args:
        parallel: tasks at once; None: as many as the cluster gives.
        after: id of the job that must end well before this one starts.
        exclude: nodes to stay away from.
    """
    resources = chunk.resources
    assert resources is not None  # a chunk for SLURM has them
    tasks = chunk.tasks if chunk.mode == POOL else len(chunk.run_ids)
    options: dict[str, Any] = {
        "job-name": f"{COMMENT}_{study}",
        "comment": comment_of(chunk.nonce),
        "array": f"0-{tasks - 1}" + (f"%{parallel}" if parallel is not None and parallel < tasks else ""),
        "chdir": str(Path.cwd()),
        "output": f"{chunk.folder}/logs/{chunk.nonce}-%a.log",
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR2@{warning_s(resources.time_limit_min)}",
        **_of_resources(resources),
    }
    if after is not None:
        options |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    options |= {key.replace("_", "-"): value for key, value in resources.extra.items()}
    if exclude:  # besides those that the user leaves out
        options["exclude"] = ",".join([*filter(None, [options.get("exclude")]), *exclude])
    worker = shlex.join([sys.executable, "-m", "qlora_lab.sweep.slurm.worker", str(chunk.file)])
    header = [_option(key, value) for key, value in options.items()]
    lines = ["#!/bin/bash", *(line for line in header if line), *resources.setup, f"exec {worker}"]
    return "\n".join(lines) + "\n"


def _of_resources(resources: SlurmConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": resources.cpus_per_run,
        "mem": f"{resources.memory_gb}G",
        "time": resources.time_limit_min,
    }
    if resources.gpus_per_run:
        options["gpus-per-node"] = resources.gpus_per_run
    named = {"partition": resources.partition, "account": resources.account, "qos": resources.qos}
    return options | {key: value for key, value in named.items() if value is not None}


def _option(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    return f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={shlex.quote(str(value))}"
