"""What this machine is, read from files of the kernel and its drivers."""

import os
from pathlib import Path

import pytest

from qlora_lab.config.hardware import (
    Hardware,
    detect,
    gpu_memory_bytes,
    product_dtype,
)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """The proc file system of a machine with three GPUs."""
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name : A CPU\nflags : avx2 amx_bf16\n\nprocessor: 1\n")
    for index, model in enumerate(["H200", "H200", "A100"]):
        folder = tmp_path / "driver" / "nvidia" / "gpus" / f"0000:{index}a:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t NVIDIA {model}\nIRQ: 5\nGPU UUID: \t GPU-{index}fe-4a\n")
    return tmp_path


def test_the_processor_is_read(proc: Path) -> None:
    machine = detect(proc, devices=proc)
    assert machine.cpu_model == "A CPU" and machine.instruction_sets == ["avx2", "amx_bf16"]
    assert detect(proc / "nowhere", devices=proc).cpu_model == "unknown"


@pytest.mark.parametrize(
    ("visible", "ids", "models"),
    [
        (None, ["0", "1", "2"], ["H200", "H200", "A100"]),
        ("", [], []),
        ("-1", [], []),
        ("2", ["2"], ["A100"]),
        ("2,0", ["2", "0"], ["A100", "H200"]),
        ("1,-1,0", ["1"], ["H200"]),  # CUDA stops at the first that is none
        ("0,3,1", ["0"], ["H200"]),
        ("GPU-2fe", ["GPU-2fe"], ["A100"]),
        (" 1, GPU-0fe-4a", ["1", "GPU-0fe-4a"], ["H200", "H200"]),
    ],
)
def test_gpus_are_those_that_the_environment_leaves(
    proc: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, ids: list[str], models: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = detect(proc)
    assert list(machine.gpu_ids) == ids
    assert list(machine.gpus) == [f"NVIDIA {model}" for model in models]


def test_a_slice_of_a_gpu_is_a_gpu_whose_model_is_not_known(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c,GPU-9")
    assert detect(proc).gpus == ("unknown GPU", "unknown GPU")
    assert detect(proc / "nowhere", devices=proc).gpus == ()


def test_a_container_may_show_only_the_device_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    machine = detect(tmp_path / "proc", devices=tmp_path)
    assert (machine.gpus, machine.gpu_ids) == (("unknown GPU",) * 2, ("0", "1"))


def test_memory_is_the_machines_or_what_its_container_leaves(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    assert detect(proc, proc, groups).memory_bytes is None
    (proc / "meminfo").write_text("MemTotal:       8000 kB\nMemFree:        10 kB\n")
    assert detect(proc, proc, groups).memory_bytes == 8000 << 10
    groups.mkdir()
    for limit, expected in (("max", 8000 << 10), ("5000000", 5_000_000)):
        (groups / "memory.max").write_text(limit + "\n")
        assert detect(proc, proc, groups).memory_bytes == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('test "$1" = --id=0,GPU-2f && printf "81920\\n24576\\n"', 24576 << 20),
        ("echo No devices were found; exit 6", None),
        ("echo [N/A]", None),
    ],
)
def test_the_smallest_gpus_memory_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: int | None
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpu_memory_bytes.cache_clear()
    assert gpu_memory_bytes(("0", "GPU-2f")) == expected
    gpu_memory_bytes.cache_clear()


@pytest.mark.parametrize(
    ("flags", "device", "dtype", "expected"),
    [
        ({"avx2", "avx512f"}, "cpu", "bfloat16", "float32"),
        ({"avx512_bf16"}, "cpu", "bfloat16", "bfloat16"),
        ({"amx_bf16"}, "cpu", "bfloat16", "bfloat16"),
        (set(), "cuda", "bfloat16", "bfloat16"),
        (set(), "cpu", "float32", "float32"),
        (set(), "cpu", "float16", "float16"),
    ],
)
def test_bfloat16_is_multiplied_in_float32_where_a_cpu_emulates_it(
    flags: set[str], device: str, dtype: str, expected: str
) -> None:
    assert product_dtype(Hardware("a CPU", frozenset(flags), 2, ()), device, dtype) == expected
