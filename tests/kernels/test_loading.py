"""Which kernels run: what was built is loaded, what cannot be is named, and both bindings compute the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.ctypes_ops import CtypesOps
from qlora_lab.ops.native.library import FILE, PATH_VARIABLE, Library
from qlora_lab.ops.native.load import BINDING_FILE, OPS
from qlora_lab.ops.registry import KERNELS
from tests.ops.op_calls import IN, arguments

native = pytest.mark.skipif(KERNELS.library is None, reason=f"no native kernels: {KERNELS.reason}")


def first_line_of_doctor(**variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_lab.doctor"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("kernels"))
    return line.removeprefix("kernels").strip()


@pytest.mark.skipif(PATH_VARIABLE in os.environ, reason=f"{PATH_VARIABLE} chooses the kernels")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_where_there_is_a_compiler_the_native_kernels_run() -> None:
    assert KERNELS.library is not None, KERNELS.reason
    assert KERNELS.binding == "stable ABI", KERNELS.reason
    assert KERNELS.library.isa == KERNELS.library.isas[-1] or "QLK_ISA" in os.environ
    assert str(KERNELS) == f"native {KERNELS.library.isa} (stable ABI)"


@native
def test_without_the_binding_ctypes_calls_the_library(tmp_path: Path) -> None:
    assert KERNELS.library is not None
    shutil.copy(KERNELS.library.path, tmp_path / FILE)
    line = first_line_of_doctor(**{PATH_VARIABLE: str(tmp_path)})
    assert line == f"native {KERNELS.library.isas[-1]} (ctypes: {BINDING_FILE} was not built)"


def test_without_the_library_the_references_run(tmp_path: Path) -> None:
    line = first_line_of_doctor(**{PATH_VARIABLE: str(tmp_path)})
    assert line.startswith(f"reference (pure torch): no {FILE} in {tmp_path}")
    assert first_line_of_doctor(**{PATH_VARIABLE: "reference"}).endswith("=reference asks for it")


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a library")
    line = first_line_of_doctor(**{PATH_VARIABLE: str(tmp_path)})
    assert line.startswith(f"reference (pure torch): {FILE} does not load")


@native
def test_an_unknown_instruction_set_is_refused() -> None:
    assert KERNELS.library is not None
    folder = str(KERNELS.library.path.parent)
    line = first_line_of_doctor(**{PATH_VARIABLE: folder, "QLK_ISA": "avx3"})
    assert "must be one of scalar, avx2, avx512; got 'avx3'; did you mean 'avx2'?" in line
    assert first_line_of_doctor(**{PATH_VARIABLE: folder, "QLK_ISA": "scalar"}).startswith("native scalar")
    with pytest.raises(KernelError, match="does not have that instruction set"):
        KERNELS.library.use_isa("avx3")


@native
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KERNELS.library is not None
    monkeypatch.setattr("qlora_lab.ops.native.library.VERSION", 99)
    with pytest.raises(KernelError, match="is of version 3 and this code needs 99; build the kernels again"):
        Library(KERNELS.library.path)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_both_bindings_compute_the_same_bits(op: str, dtype: torch.dtype) -> None:
    assert KERNELS.library is not None
    given = arguments(op, dtype)
    results = []
    for call in (getattr(torch.ops.qlora_lab, op), getattr(CtypesOps(KERNELS.library), op)):
        result = call(*given)
        result = given[-1].clone() if op == "dequantize_weight_into" else result
        results.append(result if isinstance(result, tuple) else (result,))
    for through_torch, through_ctypes in zip(*results, strict=True):
        assert through_torch.dtype == through_ctypes.dtype
        assert torch.equal(through_torch, through_ctypes)


@native
@pytest.mark.parametrize(
    ("op", "position", "wrong", "sentence"),
    [
        ("quantized_linear", 1, torch.zeros(3, dtype=torch.uint8), "too few for 2880 weights"),
        ("quantized_linear", 2, torch.zeros(3, dtype=torch.uint8), "absmax has 3 elements for 45 blocks"),
        ("quantized_linear", 2, torch.zeros(45), "absmax has the wrong dtype"),
        ("quantized_linear", 3, torch.zeros(0), "too few for 45 blocks"),
        ("quantized_linear", 5, "nf5", "no number format 'nf5'"),
        ("quantized_linear", 6, 48, "absmax has 45 elements for 60 blocks"),
        ("quantized_linear", 6, 96, "power of two"),
        ("quantized_linear", 6, 0, "not from 32 to 4096"),
        ("quantized_linear", 8, -1, "negative"),
        ("quantized_linear", 8, 2**62, "are too many"),
        ("quantized_linear", 10, torch.zeros(3), "bias must have 40 elements"),
        ("lora_linear", 11, torch.zeros(3, 3), "lora_A must be"),
        ("lora_linear_backward", 1, torch.zeros(2, IN), "do not belong together"),
        ("dequantize_weight_into", 9, torch.zeros(3), "out must be contiguous with 2880 elements"),
    ],
)
def test_the_binding_refuses_what_would_read_outside_of_a_tensor(
    op: str, position: int, wrong: Any, sentence: str
) -> None:
    given = list(arguments(op, torch.float32))
    given[position] = wrong
    with pytest.raises(RuntimeError, match=sentence):
        getattr(torch.ops.qlora_lab, op)(*given)
