"""Which kernels run: what was built is loaded, what cannot be is named, and both bindings compute the same."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab import doctor
from qlora_lab.errors import ConfigError, KernelError, ShapeError
from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.native.ctypes_ops import CtypesOps
from qlora_lab.ops.native.library import FILE, PATH_VARIABLE, Library
from qlora_lab.ops.native.load import BINDING_FILE, OPS, Kernels, load_kernels
from qlora_lab.ops.registry import KERNELS
from tests.ops.op_calls import IN, arguments

native = pytest.mark.skipif(KERNELS.library is None, reason=f"no native kernels: {KERNELS.reason}")


Load = Callable[[Path], Kernels]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load the kernels of a folder that is asked for, and nothing else, for ops of another name."""
    monkeypatch.delenv("QLK_ISA", raising=False)
    elsewhere = torch.library.Library("qlora_lab_elsewhere", "FRAGMENT")

    def kernels_of(folder: Path) -> Kernels:
        monkeypatch.setenv(PATH_VARIABLE, str(folder))
        return load_kernels(elsewhere)

    yield kernels_of
    elsewhere._destroy()


@pytest.fixture
def without_binding(tmp_path: Path) -> Path:
    """A folder with a copy of the library alone; a copy is loaded anew, and reads its variables anew."""
    assert KERNELS.library is not None
    return Path(shutil.copy(KERNELS.library.path, tmp_path / FILE)).parent


def test_the_doctor_says_which_kernels_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_lab.doctor"],
        env={**os.environ, PATH_VARIABLE: "reference"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("kernels"))
    assert line.removeprefix("kernels").strip() == f"reference (pure torch): {PATH_VARIABLE}=reference asks for it"


@native
def test_the_doctor_names_the_instruction_sets_of_the_machine() -> None:
    assert KERNELS.library is not None
    (said,) = (finding for what, finding in doctor.report() if what == "instruction sets")
    assert said.startswith(", ".join(KERNELS.library.isas) + " ") and KERNELS.library.isas[0] == "scalar"


@pytest.mark.skipif(PATH_VARIABLE in os.environ, reason=f"{PATH_VARIABLE} chooses the kernels")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_where_there_is_a_compiler_the_native_kernels_run() -> None:
    assert KERNELS.library is not None, KERNELS.reason
    assert KERNELS.binding == "stable ABI", KERNELS.reason
    assert KERNELS.library.isa == KERNELS.library.isas[-1] or "QLK_ISA" in os.environ
    assert str(KERNELS) == f"native {KERNELS.library.isa} (stable ABI)"


@native
def test_without_the_binding_ctypes_calls_the_library(without_binding: Path, load: Load) -> None:
    assert KERNELS.library is not None
    loaded = load(without_binding)
    assert str(loaded) == f"native {KERNELS.library.isas[-1]} (ctypes: {BINDING_FILE} was not built)"
    loaded.require()


def test_where_nothing_is_built_the_references_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.delenv("QLK_ISA", raising=False)
    monkeypatch.setattr("qlora_lab.ops.native.library.FILE", "libnot_built.so")
    kernels = load_kernels(torch.library.Library("qlora_lab_elsewhere", "FRAGMENT"))
    assert str(kernels).startswith("reference (pure torch): no libnot_built.so in ")
    kernels.require()


def test_a_folder_that_is_asked_for_must_hold_the_library(tmp_path: Path, load: Load) -> None:
    with pytest.raises(KernelError, match=f"{PATH_VARIABLE}={tmp_path}: no {FILE} in {tmp_path}"):
        load(tmp_path).require()
    (tmp_path / FILE).write_bytes(b"not a library")
    with pytest.raises(KernelError, match=f"{FILE} does not load"):
        load(tmp_path).require()


@pytest.mark.parametrize(
    ("folder", "isa", "refused"),
    [
        ("reference", "avx2", None),
        ("", None, None),
        ("", "reference", r"^QLK_ISA=reference: no libnot_built\.so"),
        ("/nowhere", "avx2", "^QLORA_LAB_KERNELS=/nowhere QLK_ISA=avx2: no libnot_built"),
    ],
)
def test_what_is_asked_for_is_what_the_variables_name(
    folder: str, isa: str | None, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_lab.ops.native.library.FILE", "libnot_built.so")
    monkeypatch.delenv("QLK_ISA", raising=False)
    if isa is not None:
        monkeypatch.setenv("QLK_ISA", isa)
    monkeypatch.setenv(PATH_VARIABLE, folder)
    kernels = load_kernels(torch.library.Library("qlora_lab_elsewhere", "FRAGMENT"))
    if refused is None:
        kernels.require()
    else:
        with pytest.raises(KernelError, match=refused):
            kernels.require()


@native
def test_an_unknown_instruction_set_is_refused(
    without_binding: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KERNELS.library is not None
    monkeypatch.setenv("QLK_ISA", "avx3")
    with pytest.raises(
        KernelError, match=r"one of scalar, avx2, avx512, avx512_bf16; got 'avx3'; did you mean 'avx2'\?"
    ):
        load(without_binding).require()
    monkeypatch.setenv("QLK_ISA", "scalar")
    assert str(load(without_binding)).startswith("native scalar")
    monkeypatch.setattr(Library, "isas", ("scalar", "avx2"))
    monkeypatch.setenv("QLK_ISA", "avx512")
    with pytest.raises(KernelError, match="QLK_ISA is avx512, and this machine has scalar, avx2; unset it"):
        load(without_binding).require()
    with pytest.raises(KernelError, match="does not have that instruction set"):
        KERNELS.library.use_isa("avx3")


@native
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KERNELS.library is not None
    monkeypatch.setattr("qlora_lab.ops.native.library.VERSION", 99)
    with pytest.raises(KernelError, match=r"is of version \d+ and this code needs 99; build the kernels again"):
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("millions", [5, 18])  # of weights: results of 10 to 72 MB, in small pages and in large ones
def test_large_weights_are_expanded_alike_wherever_their_memory_comes_from(millions: int, dtype: torch.dtype) -> None:
    assert KERNELS.library is not None
    rows, columns = millions * 2**10, 2**10
    packed = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight = PackedWeight(packed, torch.rand(rows * columns // 64), None, None, "nf4", 64, 256, rows, columns)
    expected = torch.ones(rows, columns, dtype=dtype)  # not new: all of it has been written
    torch.ops.qlora_lab.dequantize_weight_into(*weight, expected)
    beside = torch.full((columns,), 7.0, dtype=dtype)
    assert torch.equal(expected[:columns], reference.dequantize_weight(*_first_rows(weight, columns), dtype))
    assert torch.equal(torch.ops.qlora_lab.dequantize_weight(*weight, dtype), expected)
    assert torch.equal(CtypesOps(KERNELS.library).dequantize_weight(*weight, dtype), expected)
    room = torch.empty(rows + 2, columns, dtype=dtype)  # new, in the middle of a page
    room[0], room[-1] = beside, beside
    torch.ops.qlora_lab.dequantize_weight_into(*weight, room[1:-1])
    assert torch.equal(room[1:-1], expected)
    assert torch.equal(room[0], beside) and torch.equal(room[-1], beside)


def _first_rows(weight: PackedWeight, rows: int) -> PackedWeight:
    elements = rows * weight.in_features
    parts = {"packed": weight.packed[: elements // 2], "absmax": weight.absmax[: elements // weight.block_size]}
    return weight._replace(**parts, out_features=rows)


@native
@pytest.mark.parametrize("binding", ["stable ABI", "ctypes"])
@pytest.mark.parametrize(
    ("op", "position", "wrong", "sentence"),
    [
        ("quantize_blockwise", 0, torch.zeros(64, dtype=torch.float64), "float16,? .*got float64"),
        ("quantize_blockwise", 2, 0, "from 32 to 4096"),
        ("quantized_linear", 0, torch.zeros(2, IN, dtype=torch.float64), "float16,? .*got float64"),
        ("quantized_linear", 0, torch.zeros(2, IN - 1), f"x must have {IN} "),
        ("quantized_linear", 0, torch.zeros(()), f"x must have {IN} "),
        ("quantized_linear", 1, torch.zeros(3, dtype=torch.uint8), "too few for 2880 weights|2880 weights in nf4 take"),
        ("quantized_linear", 1, torch.zeros(1440), "packed must be uint8; got float32|packed is 1440 of float32"),
        ("quantized_linear", 2, torch.zeros(3, dtype=torch.uint8), "absmax has 3( elements for 45 blocks|; was it)"),
        ("quantized_linear", 2, torch.zeros(45), "absmax (must be|is) uint8.* float32"),
        ("quantized_linear", 3, torch.zeros(0), "45 (absmax codes make 2 )?blocks"),
        ("quantized_linear", 3, torch.zeros(2, dtype=torch.float64), "nested_absmax .*must be float32; got float64"),
        ("quantized_linear", 4, torch.zeros((), dtype=torch.float64), "offset must be (one )?float32; got .*float64"),
        ("quantized_linear", 5, "nf5", "'nf5'"),
        ("quantized_linear", 6, 48, "absmax has 45 elements for 60 blocks|power of two"),
        ("quantized_linear", 6, 96, "power of two"),
        ("quantized_linear", 6, 0, "from 32 to 4096"),
        ("quantized_linear", 8, -1, r"a weight cannot have a shape of \(-1, 72\)"),
        ("quantized_linear", 8, 2**62, "are too many|weights in nf4 take"),
        ("quantized_linear", 10, torch.zeros(3), "bias must have "),
        ("quantized_linear_grad_input", 0, torch.zeros(2, IN), "grad_output must have 40 "),
        ("lora_linear", 11, torch.zeros(3, 3), "lora_A must be"),
        ("lora_linear", 11, torch.zeros(()), "lora_A must be"),
        ("lora_linear_backward", 12, torch.zeros(4, IN).bfloat16(), "lora_A .*must .*be.* float32.* bfloat16"),
        ("lora_linear_backward", 1, torch.zeros(2, IN), "do not belong together"),
        ("lora_linear_backward", 1, torch.zeros(2, 3, IN, dtype=torch.bfloat16), "do not belong together"),
        ("lora_linear_backward", 2, torch.zeros(6, 3), "do not belong together"),
        ("dequantize_weight_into", 9, torch.zeros(3), "out must be contiguous "),
        ("dequantize_absmax", 0, torch.zeros(45), "uint8.* float32"),
        ("dequantize_absmax", 1, torch.zeros(1), "nested_absmax *has 1 "),
        ("dequantize_absmax", 1, torch.zeros(2, dtype=torch.int8), "nested_absmax .*must be float32; got int8"),
        ("quantize_absmax", 0, torch.zeros(45, dtype=torch.float64), "absmax must be float32.* got .*float64"),
    ],
)
def test_no_binding_reads_or_writes_outside_of_a_tensor(
    op: str, position: int, wrong: Any, sentence: str, binding: str
) -> None:
    assert KERNELS.library is not None
    given = list(arguments(op, torch.float32))
    given[position] = wrong
    call = getattr(torch.ops.qlora_lab if binding == "stable ABI" else CtypesOps(KERNELS.library), op)
    with pytest.raises((RuntimeError, ConfigError, ShapeError), match=sentence):
        call(*given)


@native
def test_a_library_of_something_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / FILE
    shutil.copy(Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so", other)
    with pytest.raises(KernelError, match="is another library: it has no qlk_version"):
        Library(other)


@native
def test_a_binding_that_does_not_load_is_named_and_ctypes_takes_its_place(without_binding: Path, load: Load) -> None:
    (without_binding / BINDING_FILE).write_bytes(b"not a library")
    said = str(load(without_binding))
    assert "(ctypes: " in said and BINDING_FILE in said and "was not built" not in said


OPENMP_FILES = """
import re, torch
from pathlib import Path
import qlora_lab.ops.blockwise.op

torch.ops.qlora_lab.quantize_blockwise(torch.ones(2**16), "nf4", 64)
words = Path("/proc/self/maps").read_text().split()
print(len({word for word in words if re.search(r"/lib[gi]?omp[0-9]*[-.]", word)}))
"""


@native
def test_kernels_run_on_the_threads_of_torch() -> None:
    """In a process of its own: other packages bring other threads."""
    done = subprocess.run([sys.executable, "-c", OPENMP_FILES], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
