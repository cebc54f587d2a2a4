"""The steps of gpu_check.py: what each runs, and what it cannot do without."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

BUILD = "build"  # the name of the step that others need
# Tests of kernels that do not load are skipped, and nobody would see it.
LOAD = (
    "import sys; from qlora_lab.ops.registry import CUDA_KERNELS;"
    " print(CUDA_KERNELS); sys.exit(CUDA_KERNELS.library is None)"
)
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SANITIZER_REFUSALS = ("Device not supported",)  # as in sandboxes that hide the GPU's debugger interface


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
    """One step: `commands` returns what to run, or raises CannotRunError; `results` is a JSON that they write.

    A step that hangs is stopped after `limit_s`, so that the others have their time. One that fails with a text of
    `refusals` in what it prints could not run on this machine. Where the build did not pass, steps that need the
    kernels are left out: the references, or kernels of an earlier build, would prove nothing.
    """

    name: str
    commands: Callable[[Context], Sequence[Sequence[str]]]
    results: Path | None = None
    limit_s: float = 150.0
    refusals: tuple[str, ...] = ()
    needs_kernels: bool = True


def needs(tool: str) -> str:
    """Return the path of a command, also beside this Python or CUDA's own, or raise CannotRunError."""
    beside = (str(Path(sys.executable).parent), "/usr/local/cuda/bin")
    path = shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(beside))
    if path is None:
        raise CannotRunError(f"there is no {tool} on this machine")
    return path


def build(context: Context) -> list[list[str]]:
    """Return what builds both libraries, and loads them.

    The binding of the CPU kernels, which needs torch's headers, is not used.
    """
    nvcc, cmake = needs("nvcc"), needs("cmake")
    needs("c++")
    options = [
        *("-DQLK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={context.python}"),
        f"-DCMAKE_CUDA_ARCHITECTURES={context.capability}",
    ]
    jobs = str(len(os.sched_getaffinity(0)))
    return [
        [cmake, "-S", "kernels", "-B", str(context.build), *options],
        [cmake, "--build", str(context.build), "-j", jobs, "--target", "qlk_cpu", "qlk_cuda"],
        [context.python, "-c", LOAD],
    ]


def tests(context: Context) -> list[list[str]]:
    if find_spec("pytest") is None:
        raise CannotRunError("there is no pytest in this Python")
    return [[context.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/cuda"]]


def tests_of_offloading(context: Context) -> list[list[str]]:
    for package in ("pytest", "transformers", "jinja2"):
        if find_spec(package) is None:
            raise CannotRunError(f"there is no {package} in this Python")
    return [
        [context.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/train/test_offload.py"]
    ]


def sanitizer(tool: str) -> Callable[[Context], list[list[str]]]:
    def commands(context: Context) -> list[list[str]]:
        path, nvcc = needs("compute-sanitizer"), needs("nvcc")
        program, library = context.build / "memory_check", context.build / "libqlk_cuda.so"
        compile_ = [
            *(nvcc, "-std=c++17", "-O1", "-Ikernels/include", f"-I{context.build}/include"),
            *("kernels/emu/memory_check.cpp", "-o", str(program), str(library)),
            f"-Xlinker=-rpath,{context.build}",
        ]
        watch = [path, "--tool", tool, "--error-exitcode", "9", str(program)]
        is_compiled = program.exists() and program.stat().st_mtime_ns > library.stat().st_mtime_ns
        return [watch] if is_compiled else [compile_, watch]  # by the sanitizer before

    return commands


def benchmark(results: Path) -> Callable[[Context], list[list[str]]]:
    return lambda context: [[context.python, "kernels/bench/cuda_ops.py", "--json", str(results)]]


def training_step(results: Path) -> Callable[[Context], list[list[str]]]:
    def commands(context: Context) -> list[list[str]]:
        if find_spec("transformers") is None:
            raise CannotRunError("there is no transformers in this Python")
        script = "kernels/bench/training_step_gpu.py"
        return [[context.python, script, "--rounds", "1", "--json", str(results)]]

    return commands


def memory_proof(shape: str, cap_gib: int, results: Path, *options: str) -> Callable[[Context], list[list[str]]]:
    def commands(context: Context) -> list[list[str]]:
        if find_spec("transformers") is None:
            raise CannotRunError("there is no transformers in this Python")
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
    measured, step_measured = scratch / "cuda_ops.json", scratch / "training_step.json"
    return [
        Step(BUILD, build, needs_kernels=False),
        Step("tests", tests),
        Step("tests of offloading", tests_of_offloading, limit_s=60.0, needs_kernels=False),
        *(
            Step(f"compute-sanitizer {tool}", sanitizer(tool), limit_s=60.0, refusals=SANITIZER_REFUSALS)
            for tool in SANITIZERS
        ),
        Step("benchmark", benchmark(measured), measured),
        Step("training step", training_step(step_measured), step_measured),
        *proofs(scratch),
    ]
