"""Everything that only a GPU can tell, in one command: python kernels/bench/gpu_check.py [--out FILE].

Builds the CUDA kernels for this GPU, runs the tests on it, watches small shapes with compute-sanitizer, trains models
of up to 65B parameters within the memory of smaller GPUs, measures, and writes one JSON. Works with the Python and
torch it finds and needs no network. A step that cannot run here is left out with its reason, a step that fails is
recorded and the next one runs; the exit status is 1 if any failed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 470.0  # of all steps; a step gets what is left of it
SHORTEST_S = 5.0  # with less left a step is not begun
KEPT_LINES = 40  # of a failed step's output


class CannotRunError(Exception):
    """Why a step cannot run on this machine."""


@dataclass
class Context:
    """What the steps share."""

    build: Path
    python: str
    capability: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Step:
    """One step: `commands` returns what to run, or raises CannotRunError; `results` is a JSON that they write."""

    name: str
    commands: Callable[[Context], Sequence[Sequence[str]]]
    results: Path | None = None


@dataclass
class Outcome:
    """What became of a step: `passed`, `failed` or `left out`."""

    name: str
    status: str
    seconds: float
    reason: str = ""
    results: Any = None


Runner = Callable[[Sequence[str], dict[str, str], float], tuple[int, str]]


def run_command(command: Sequence[str], environment: dict[str, str], limit_s: float) -> tuple[int, str]:
    """Run a command in the checkout; return its exit status (124: it took too long) and what it printed."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return 124, f"{printed}\nstopped after {limit_s:.0f} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def run_steps(
    steps: Sequence[Step],
    context: Context,
    budget_s: float = BUDGET_S,
    runner: Runner = run_command,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the steps in order; none stops the others."""
    started = clock()
    outcomes = []
    for step in steps:
        begun = clock()
        if step.results is not None:
            step.results.unlink(missing_ok=True)  # of an earlier check
        status, reason, results = "passed", "", None
        try:
            for command in step.commands(context):
                left = budget_s - (clock() - started)
                if left < SHORTEST_S:
                    raise CannotRunError(f"no time left of {budget_s:.0f} s")
                exit_status, printed = runner(command, context.environment, left)
                if exit_status != 0:
                    last = "\n".join(printed.splitlines()[-KEPT_LINES:])
                    status, reason = "failed", f"{' '.join(map(str, command))}: exit status {exit_status}\n{last}"
                    break
        except CannotRunError as error:
            status, reason = "left out", str(error)
        if step.results is not None and step.results.exists() and status != "left out":
            results = json.loads(step.results.read_text())
        outcomes.append(Outcome(step.name, status, round(clock() - begun, 1), reason, results))
        print(f"{step.name:<36} {status:<9} {outcomes[-1].seconds:>6.1f} s  {reason.splitlines()[0] if reason else ''}")
    return outcomes


def needs(tool: str) -> str:
    """Return the path of a command, or raise CannotRunError."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")
    if path is None:
        raise CannotRunError(f"there is no {tool} on this machine")
    return path


def build(context: Context) -> list[list[str]]:
    nvcc = needs("nvcc")
    for tool in ("cmake", "c++"):
        needs(tool)
    options = [
        *("-DQLK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={context.python}"),
        f"-DCMAKE_CUDA_ARCHITECTURES={context.capability}",
    ]
    return [
        ["cmake", "-S", "kernels", "-B", str(context.build), *options],
        ["cmake", "--build", str(context.build), "-j", str(os.cpu_count() or 1)],
    ]


def tests(context: Context) -> list[list[str]]:
    if find_spec("pytest") is None:
        raise CannotRunError("there is no pytest in this Python")
    return [[context.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/cuda"]]


def sanitizer(tool: str) -> Callable[[Context], list[list[str]]]:
    def commands(context: Context) -> list[list[str]]:
        path, nvcc, program = needs("compute-sanitizer"), needs("nvcc"), context.build / "memory_check"
        if not (context.build / "libqlk_cuda.so").exists():
            raise CannotRunError("the CUDA kernels were not built")
        compile_ = [
            *(nvcc, "-std=c++17", "-O1", "-Ikernels/include", f"-I{context.build}/include"),
            *("kernels/emu/memory_check.cpp", "-o", str(program), str(context.build / "libqlk_cuda.so")),
            f"-Xlinker=-rpath,{context.build}",
        ]
        return [compile_, [path, "--tool", tool, "--error-exitcode", "9", str(program)]]

    return commands


def benchmark(results: Path) -> Callable[[Context], list[list[str]]]:
    return lambda context: [[context.python, "kernels/bench/cuda_ops.py", "--json", str(results)]]


def memory_proof(shape: str, cap_gib: int, results: Path, *options: str) -> Callable[[Context], list[list[str]]]:
    def commands(context: Context) -> list[list[str]]:
        for package in ("transformers", "omegaconf"):
            if find_spec(package) is None:
                raise CannotRunError(f"there is no {package} in this Python")
        script = [context.python, "kernels/bench/memory_proof.py", shape, "--cap-gib", str(cap_gib)]
        return [[*script, *options, "--json", str(results)]]

    return commands


def proofs(scratch: Path) -> list[Step]:
    """Return the proofs: published shapes in the memory of common GPUs; 65B with 8-bit states, and with more tokens."""
    steps = []
    for shape, cap_gib, *options in (
        ("7b", 8),
        ("13b", 12),
        ("33b", 24),
        ("65b", 48),
        ("65b", 48, "--optim", "paged_adamw_8bit"),
        ("65b", 48, "--tokens", "2048"),
    ):
        name = " ".join((f"memory {shape}", *map(str, options)))
        results = scratch / f"{name.replace(' ', '_')}.json"
        steps.append(Step(name, memory_proof(str(shape), int(cap_gib), results, *map(str, options)), results))
    return steps


def all_steps(scratch: Path) -> list[Step]:
    measured = scratch / "cuda_ops.json"
    return [
        Step("build", build),
        Step("tests", tests),
        *(Step(f"compute-sanitizer {tool}", sanitizer(tool)) for tool in ("memcheck", "racecheck", "initcheck")),
        *proofs(scratch),
        Step("benchmark", benchmark(measured), measured),
    ]


def printed_by(*command: str) -> str | None:
    """Return what a command prints; None where it fails, as git does in a copy without a repository."""
    status, printed = run_command(command, {}, 30.0)
    return printed.strip() if status == 0 else None


def machine() -> dict[str, Any]:
    """Return what was measured on: the commit, the GPU, its driver, torch.

    Raises:
        CannotRunError: there is no GPU, or torch cannot use it.
    """
    try:
        import torch
    except ImportError as error:
        raise CannotRunError(f"this Python has no torch ({error})") from error
    if not torch.cuda.is_available():
        raise CannotRunError("torch finds no GPU that it can use")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    commit = printed_by("git", "rev-parse", "HEAD")
    changed = printed_by("git", "status", "--porcelain", "--untracked-files=no")
    major, minor = torch.cuda.get_device_capability()
    return {
        "commit": f"{commit}+changes" if commit and changed else commit,
        "gpu": torch.cuda.get_device_name(),
        "nvidia_smi": printed_by(*query),
        "capability": f"{major}{minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON; by default kernels/bench/results/GPU-COMMIT.json")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu")
    options = parser.parse_args()
    try:
        found = machine()
    except CannotRunError as error:
        print(f"nothing was checked: {error}", file=sys.stderr)
        return 2
    scratch = options.build.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    capability = found["capability"] + ("a-real" if found["capability"] == "90" else "-real")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"QLORA_LAB_KERNELS": str(scratch), "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    outcomes = run_steps(all_steps(scratch), Context(scratch, sys.executable, capability, environment))
    name = f"{found['gpu'].replace(' ', '-')}-{(found['commit'] or 'unknown')[:10]}.json"
    out = options.out or ROOT / "kernels" / "bench" / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": found, "steps": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")
    print(f"written: {out}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
