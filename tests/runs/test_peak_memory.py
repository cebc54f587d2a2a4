"""Peak memory of one run, also in a process that does several."""

import os
import sys
from pathlib import Path

import pytest

from qlora_lab.runs.peak_memory import PeakRss


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakRss, "_used_before", False)


def proc(folder: Path, peak_kib: int) -> Path:
    (folder / "status").write_text(f"Name:\tpython\nVmPeak:\t  999 kB\nVmHWM:\t  {peak_kib} kB\nVmRSS:\t  1 kB\n")
    return folder


def test_the_peak_is_set_back_where_the_system_can(tmp_path: Path) -> None:
    first, second = PeakRss(proc(tmp_path, 4000)), PeakRss(proc(tmp_path, 3000))
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert first.known and second.known
    assert second.peak_bytes() == 3000 * 1024


def test_elsewhere_only_the_first_run_of_a_process_has_one(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    first, second = PeakRss(proc(tmp_path, 4000)), PeakRss(proc(tmp_path, 4000))
    assert first.peak_bytes() == 4000 * 1024
    assert second.peak_bytes() is None


def test_without_proc_the_process_is_asked(tmp_path: Path) -> None:
    peak = PeakRss(tmp_path / "absent").peak_bytes()
    assert peak is not None and peak > 10**7


@pytest.mark.skipif(sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_a_big_run_leaves_no_peak_behind() -> None:
    before = PeakRss()
    block = bytearray(os.urandom(1)) * 200_000_000
    big = before.peak_bytes()
    del block
    small = PeakRss().peak_bytes()
    assert big is not None and small is not None and small < big - 150_000_000
