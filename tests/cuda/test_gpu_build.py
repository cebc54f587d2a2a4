"""The build of `make gpu-check`, as far as a machine without a GPU takes it: what links, and what that asks for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.cuda_library import CUDA_FILE, CudaLibrary
from qlora_lab.ops.registry import CUDA_KERNELS
from tests.cuda.emulator import ROOT
from tests.cuda.scripts import load_script

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
    pytest.mark.skipif("QLORA_LAB_GATE" not in os.environ, reason="make kernels-check builds them, for a minute"),
]


@pytest.fixture(scope="module")
def gpu_steps() -> ModuleType:
    return load_script("gpu_steps")


@pytest.fixture(scope="module")
def built(gpu_steps: ModuleType) -> Path:
    """The folder of both libraries, for an H200."""
    context = gpu_steps.Context(ROOT / "build" / "gpu-gate", sys.executable, "90a-real")
    *build, _ = gpu_steps.build(context)
    for command in build:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return Path(context.build)


def printed_by(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_library_needs_nothing_of_cuda(built: Path) -> None:
    """Its runtime is inside, and dense products are torch's: nothing is searched for, and nothing clashes."""
    needed = re.findall(r"NEEDED.*\[(.+?)\]", printed_by("readelf", "-d", built / CUDA_FILE))
    assert "libc.so.6" in needed
    assert [name for name in needed if re.match(r"lib(cu|nv|torch|c10|stdc)", name)] == []
    exported = [line.split()[-1] for line in printed_by("nm", "-D", "--defined-only", built / CUDA_FILE).splitlines()]
    assert exported and all(name.startswith("qlk_cuda_") for name in exported)


@pytest.mark.skipif(CUDA_KERNELS.library is not None, reason="this machine has a GPU")
def test_without_a_driver_it_loads_and_says_so(built: Path) -> None:
    with pytest.raises(KernelError, match="there is no NVIDIA driver"):
        CudaLibrary(built / CUDA_FILE)


@pytest.mark.skipif(CUDA_KERNELS.library is not None, reason="this machine has a GPU")
def test_what_compute_sanitizer_watches_links(
    gpu_steps: ModuleType, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = gpu_steps.needs
    monkeypatch.setattr(gpu_steps, "needs", lambda tool: tool if tool == "compute-sanitizer" else needs(tool))
    compile_, (*_, program) = gpu_steps.sanitizer("memcheck")(gpu_steps.Context(built, sys.executable))
    done = subprocess.run(compile_, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 2 and "CUDA: " in ran.stdout  # its first allocation finds no driver
