"""Settings of the heap, and the program that starts again to have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.runs.heap import VARIABLE, give_back, heap_environment

OURS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, OURS),
        ({VARIABLE: ""}, OURS),
        ({VARIABLE: OURS}, OURS),
        ({VARIABLE: "glibc.malloc.mxfast=64"}, "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=64"),
        ({VARIABLE: "glibc.malloc.hugetlb=1"}, f"{OURS}:glibc.malloc.hugetlb=1"),
    ],
)
def test_what_the_environment_sets_stays(given: dict[str, str], expected: str) -> None:
    assert heap_environment({"HOME": "/", **given}) == {VARIABLE: expected}
    assert heap_environment({VARIABLE: expected}) == {VARIABLE: expected}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_what_is_free_between_what_is_used_goes_back_to_the_system() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]
    last = bytearray(b"x" * 100_000)  # above them, so that the heap cannot simply end earlier
    blocks.clear()
    before = resident_bytes()
    give_back()
    assert resident_bytes() < before - 50_000_000
    assert len(last) == 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_a_program_starts_again_once_in_the_same_process() -> None:
    program = (
        "import os, sys; from qlora_lab.runs.heap import restart_with_heap_settings; print(os.getpid(), sys.argv[1:]); "
        f"restart_with_heap_settings(); print('runs with', os.environ['{VARIABLE}'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", program, "a b", "c"], env=environment, capture_output=True, text=True, check=True
    )
    first, second, last = done.stdout.splitlines()
    assert first == second and first.endswith("['a b', 'c']")
    assert last == f"runs with {OURS}"
