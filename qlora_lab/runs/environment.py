"""What a run ran on, for its record: package versions, code, machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from qlora_lab.config.hardware import Hardware

PACKAGES = (
    "qlora_lab",
    "torch",
    "lightning",
    "transformers",
    "safetensors",
    "datasets",
    "hydra-core",
    "omegaconf",
    "submitit",
    "wandb",
    "pandas",
    "numpy",
)


def environment(hardware: Hardware, **of_the_run: Any) -> dict[str, Any]:
    """Return the environment record; `of_the_run` adds what only the running process knows."""
    return {
        "packages": {name: package_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(Path(__file__).parent),
        "cpu": hardware.cpu_model,
        "instruction_sets": hardware.instruction_sets,
        "cores": hardware.cores,
        "gpus": list(hardware.gpus),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        **of_the_run,
    }


def git_commit(folder: Path, *paths: str) -> str | None:
    """Return the commit of the code, with `+changes` where files (or those below `paths`) differ from it.

    None outside git.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *paths).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit


def measured_commit(root: Path = Path(__file__).parents[2]) -> str:
    """Return the commit that a benchmark measured, for its results; "unknown" outside git.

    With `+changes` where the kernels or the library differ from it; results written before make no difference.
    """
    return git_commit(root, "kernels", "qlora_lab", ":!kernels/bench/results") or "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


def package_version(package: str) -> str | None:
    from importlib import metadata  # it takes 30 ms, and planning needs none of it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
