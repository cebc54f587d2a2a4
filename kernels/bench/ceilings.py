"""What this machine can do at best: the rates that floors are computed from."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

COPIED_BYTES = 2**28  # far beyond any cache
TRIES = 15


def copy_bytes_per_s() -> float:
    """Return the bytes read and written a second by torch's copy of a large tensor into memory it has already."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(TRIES + 1):  # the first touches the pages
        started = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * COPIED_BYTES / (time.perf_counter() - started))
    return best


def peak_flops_per_s(threads: int) -> float | None:
    """Return the float32 operations a second of independent multiply-adds; None without a C++ compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peak.so"
        flags = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
        subprocess.run([compiler, *flags, str(Path(__file__).with_name("peak.cpp")), "-o", str(built)], check=True)
        peak = ctypes.CDLL(str(built)).peak_flops
    peak.restype = ctypes.c_double
    return max(float(peak(threads)) for _ in range(TRIES))
