"""The emulator finds what would be wrong on a GPU, or only sometimes wrong."""

import ctypes
import math
import os
import subprocess

import pytest

from qlora_lab.ops.native.cuda_library import CudaLibrary
from tests.cuda.emulator import KERNELS, build

FAILED_LAUNCH = 1000 + 719
SANITIZE = "QLORA_LAB_SANITIZE"


def misbehave(library: CudaLibrary, which: int) -> tuple[int, str, float]:
    handle, out = ctypes.CDLL(str(library.path)), ctypes.c_float(0.0)
    status = handle.qlk_emu_misbehave(which, ctypes.byref(out))
    handle.qlk_cuda_status_text.restype = ctypes.c_char_p
    return status, handle.qlk_cuda_status_text(status).decode(), out.value


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        (0, "wait for ever at the barrier at misbehave.cpp:9: 32 of 64 threads have returned"),
        (1, "different barriers: misbehave.cpp:16 and misbehave.cpp:14"),
        (2, "lanes of one warp meet in different places"),
        (3, "an exchange of some lanes only"),
        (4, "takes 49156 bytes of shared memory; it has 49152"),
    ],
)
def test_broken_rules_are_failed_launches(emulated: CudaLibrary, which: int, sentence: str) -> None:
    status, text, _ = misbehave(emulated, which)
    assert status == FAILED_LAUNCH
    assert sentence in text


def test_shared_memory_is_nan_until_it_is_written(emulated: CudaLibrary) -> None:
    status, _, out = misbehave(emulated, 5)
    assert status == 0
    assert math.isnan(out)


def test_a_failed_launch_leaves_the_emulator_usable(emulated: CudaLibrary) -> None:
    misbehave(emulated, 0)
    assert misbehave(emulated, 5)[0] == 0


@pytest.mark.skipif(SANITIZE not in os.environ, reason=f"builds for half a minute; set {SANITIZE}=1")
def test_kernels_stay_within_their_memory() -> None:
    extra = [KERNELS / "emu" / name for name in ("misbehave.cpp", "memory_check.cpp")]
    program = build("memory_check", *extra, sanitize=True, shared=False)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr[-3000:]
    beyond = subprocess.run([program, "6"], capture_output=True, text=True)
    assert "use-after-poison" in beyond.stderr  # the gap after a shared array
