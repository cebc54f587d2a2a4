"""What this machine can do at best, asked anew in every round: its clock and its memory are not the same twice."""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

STEPS = 100_000  # of chains of multiply-adds: under a millisecond
# Ways to read: arrays side by side, and whether their lines are asked for ahead. Which is fastest depends on the
# machine and on the size.
READING = ((1, False), (4, False), (1, True))


class Ceilings:
    """Work that does nothing but what a cell has to do at least."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        compiler = shutil.which("c++")
        if compiler is None:
            sys.exit("the floors are measured by a small program: a C++ compiler (c++) is needed")
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "ceilings.so"
            flags = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
            subprocess.run([compiler, *flags, str(Path(__file__).with_suffix(".cpp")), "-o", str(built)], check=True)
            self._library = ctypes.CDLL(str(built))
        self._library.multiply_adds.restype = ctypes.c_int64
        self._library.multiply_adds.argtypes = (ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        pointer_and_size = (ctypes.c_void_p, ctypes.c_int64)
        self._library.move.argtypes = (*pointer_and_size, *pointer_and_size, *[ctypes.c_int] * 4)

    def flops(self, dtype: str) -> int:
        """Do independent multiply-adds on every thread; return the operations, two each.

        Args:
            dtype: "bf16", for which the units of bfloat16 are taken where there are any, or "fp32".
        """
        return 2 * self._threads * int(self._library.multiply_adds(STEPS, self._threads, dtype == "bf16"))

    def bytes(self, read: int, written: int, in_place: bool) -> list[Callable[[], Any]]:
        """Return the ways to read and write so many bytes, of which the fastest counts.

        Those of `READING`, each with ordinary stores and with stores past the caches. Memory is as large as what is
        read and written, so what fits in a cache stays there as it does for a kernel.
        """
        source = torch.ones(read // 64 * 64 + 64, dtype=torch.uint8)
        target = None if in_place else torch.ones(written // 64 * 64 + 64, dtype=torch.uint8)

        def move(streams: int, prefetch: bool, past_caches: bool) -> None:
            to = None if target is None else target.data_ptr()
            self._library.move(source.data_ptr(), read, to, written, streams, prefetch, past_caches, self._threads)

        stores = (False, True) if written else (False,)
        return [partial(move, *reading, past_caches) for reading in READING for past_caches in stores]
