"""A machine with a GPU may have torch and little else: what `make gpu-check` runs there imports without the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.scripts import FOLDER

ROOT = Path(__file__).parents[2]
# What a project installs for planning, tracking and data; the second line also for models.
OURS = ("accelerate", "bitsandbytes", "datasets", "gguf", "hydra", "omegaconf", "pandas", "peft", "submitit", "wandb")
MODELS = ("huggingface_hub", "jinja2", "lightning", "safetensors", "tokenizers", "transformers", "xxhash", "yaml")
HIDE = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
hidden = set(sys.argv.pop(1).split(","))
PathFinder.find_spec = classmethod(
    lambda _, name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)
)
"""


def run_without(packages: tuple[str, ...], code: str, *arguments: str) -> str:
    """Return what code prints where these packages are not installed."""
    folders = [str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    # plugins of pytest belong to packages too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", HIDE + code, ",".join(packages), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("scripts", "packages"),
    [("gpu_check, cuda_ops", OURS + MODELS), ("memory_proof, training_step_gpu", OURS)],
)
def test_scripts_import(scripts: str, packages: tuple[str, ...]) -> None:
    run_without(packages, f"import {scripts}")


@pytest.mark.parametrize(("tests", "packages"), [("tests/cuda", OURS + MODELS), ("tests/train/test_offload.py", OURS)])
def test_the_tests_of_a_gpu_are_collected(tests: str, packages: tuple[str, ...]) -> None:
    """They skip where there is no GPU; an import that fails would be an error."""
    collect = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    listed = run_without(packages, collect, "-m", "gpu", "-p", "no:cacheprovider", "--collect-only", tests)
    assert "test_streams.py" in listed or "test_offload.py" in listed
