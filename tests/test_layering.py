"""Imports point down two chains that meet only in run.py, and planning starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_lab

PACKAGE = Path(qlora_lab.__file__).parent
LIGHT = [
    "errors",
    "hashing",
    "listening",
    "config",
    "wheels",
    "fetch",
    "runs",
    "memory",
    "tracking",
    "sweep",
    "sync",
    "ratings",
    "tournament",
    "judging",
    "judge",
    "annotation",
    "annotate",
    "agreement",
    "publishing",
    "release",
    "export",
]
HEAVY = ["ops", "quant", "adapters", "models", "data", "train", "evaluation", "workbench", "serving", "merging"]
# What the heavy chain may use of the light one.
SHARED = {"errors", "hashing", "listening", "config", "wheels", "runs", "ratings"}
COMMAND_LINES = {"__main__.py"}
# May import anything, or nothing.
TOP = {"run.py", "evaluate.py", "merge.py", "serve.py", "chat.py", "doctor.py", "plugins", "__init__.py"}


def imported(file: Path) -> set[str]:
    """Return the names below qlora_lab that a file imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qlora_lab"):
            inside = node.module.split(".")[1:]
            names |= {inside[0]} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qlora_lab.")}
    return names


def allowed(part: str) -> set[str]:
    if part in LIGHT:
        return set(LIGHT[: LIGHT.index(part) + 1])
    # train stands beside evaluation and serving
    chain = [name for name in HEAVY[: HEAVY.index(part) + 1] if name != "train" or part in ("train", "merging")]
    return set(chain) | SHARED


FILES = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.name not in COMMAND_LINES and file.relative_to(PACKAGE).parts[0] not in TOP
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in LIGHT + HEAVY, f"{file} belongs to no layer"
    assert imported(file) <= allowed(part), f"{file} imports {imported(file) - allowed(part)}"


def test_the_light_chain_never_imports_torch() -> None:
    modules = [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for file in FILES
        if file.relative_to(PACKAGE).parts[0].removesuffix(".py") in LIGHT and file.name != "__init__.py"
    ]
    modules += ["qlora_lab.sweep.__main__", "qlora_lab.train.__main__", "analysis.report.__main__", "analysis.load"]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "heavy = {'torch', 'transformers', 'lightning', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_and_the_words_about_a_study_start_without_hydra() -> None:
    """It and OmegaConf take longer to import than all else they need."""
    modules = ["qlora_lab.sweep.slurm.worker", "qlora_lab.sweep.steer"]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "found = {'hydra', 'omegaconf', 'submitit', 'numpy', 'pandas'} & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_begins_without_what_few_commands_need() -> None:
    """Half a second of imports is Hydra's, and the most that the start of each command may take."""
    code = "import sys, qlora_lab.sweep.command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "hydra" in loaded
    slow = {"importlib.metadata", "numpy", "pandas", "wandb", "submitit", "transformers"}
    slow |= {"qlora_lab.sweep.preview", "qlora_lab.sweep.steer", "qlora_lab.sweep.slurm.scheduler"}
    assert not loaded & slow
