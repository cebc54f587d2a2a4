"""C libraries through ctypes, and the one of the CPU kernels (kernels/include/qlk.h)."""

import ctypes
import os
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from qlora_lab.errors import KernelError, unknown_name
from qlora_lab.ops.formats import FORMATS

VERSION = 8  # QLK_VERSION of kernels/include/qlk.h
FILE = "libqlk_cpu.so"
FOLDER = "qlora_lab/_native"  # inside an installed package
PATH_VARIABLE = "QLORA_LAB_KERNELS"  # a folder to load from instead, or REFERENCE
REFERENCE = "reference"
ISA_VARIABLE = "QLK_ISA"
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")


class WeightView(ctypes.Structure):
    """struct qlk_weight."""

    _fields_ = (
        ("packed", c_void_p),
        ("absmax", c_void_p),
        ("nested_absmax", c_void_p),
        ("offset", c_void_p),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("block_size", c_int64),
        ("nested_block_size", c_int64),
        ("format", c_int32),
    )


class AdapterView(ctypes.Structure):
    """struct qlk_adapter."""

    _fields_ = (
        ("lora_A", c_void_p),
        ("lora_B", c_void_p),
        ("rank", c_int64),
        ("scaling", c_float),
        ("dropout", c_float),
        ("seed", c_uint64),
    )


class AttentionView(ctypes.Structure):
    """struct qlk_attention."""

    _fields_ = (
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("query_strides", c_int64 * 3),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 2),
        ("rows", c_int64),
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("tokens", c_int64),
        ("head_size", c_int64),
        ("scale", c_float),
        ("causal", c_int32),
        ("dtype", c_int32),
    )


class AdamwView(ctypes.Structure):
    """struct qlk_adamw_tensor."""

    _fields_ = (
        ("parameter", c_void_p),
        ("gradient", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("exp_avg_absmax", c_void_p),
        ("exp_avg_sq_absmax", c_void_p),
        ("numel", c_int64),
        ("weight_decay", c_float),
        ("dtype", c_int32),
    )


WEIGHT, ADAPTER, TENSORS = POINTER(WeightView), POINTER(AdapterView), POINTER(AdamwView)
ATTENTION = POINTER(AttentionView)
SIGNATURES = {
    "qlk_cpu_quantize": (c_void_p, c_int, c_int64, c_int, c_int64, c_void_p, c_void_p, c_int),
    "qlk_cpu_dequantize": (WEIGHT, c_int, c_void_p, c_int),
    "qlk_cpu_expect_writes": (c_void_p, c_int64),
    "qlk_cpu_quantize_absmax": (c_void_p, c_int64, c_int64, c_float, c_void_p, c_void_p, c_int),
    "qlk_cpu_dequantize_absmax": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int),
    "qlk_cpu_linear": (c_void_p, c_int, c_int64, WEIGHT, c_void_p, c_void_p, c_int),
    "qlk_cpu_linear_grad_input": (c_void_p, c_int, c_int64, WEIGHT, c_void_p, c_int),
    "qlk_cpu_lora_linear": (c_void_p, c_int, c_int64, WEIGHT, c_void_p, ADAPTER, c_void_p, c_void_p, c_int),
    "qlk_cpu_lora_linear_backward": (
        *(c_void_p, c_void_p, c_void_p, c_int, c_int64, WEIGHT, ADAPTER),
        *(c_void_p, c_void_p, c_void_p, c_int),
    ),
    "qlk_cpu_dense_linear": (c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "qlk_cpu_dense_grad_input": (c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64, c_void_p, c_int),
    "qlk_cpu_attention": (ATTENTION, c_void_p, c_void_p, c_int),
    "qlk_cpu_attention_backward": (ATTENTION, *[c_void_p] * 6, c_int),
    "qlk_cpu_rms_norm": (c_void_p, c_int, c_int64, c_int64, c_void_p, c_float, c_void_p, c_void_p, c_int),
    "qlk_cpu_rms_norm_backward": (*(c_void_p, c_void_p, c_int, c_int64, c_int64), *[c_void_p] * 3, c_int),
    "qlk_cpu_silu_gate": (c_void_p, c_void_p, c_int, c_int64, c_void_p, c_int),
    "qlk_cpu_silu_gate_backward": (*(c_void_p, c_void_p, c_void_p, c_int, c_int64), *[c_void_p] * 2, c_int),
    "qlk_cpu_gradient_norm": (TENSORS, c_int64, c_double, POINTER(c_double), POINTER(c_int64), c_int),
    "qlk_cpu_adamw": (TENSORS, c_int64, *[c_double] * 5, c_int64, c_int64, c_int),
    "qlk_cpu_use_isa": (c_char_p,),
}


class CLibrary:
    """A loaded C library: every function of its header by name, raising KernelError for a bad status.

    Args:
        path: the file.
        prefix: of the functions that say the version and what a status means.
        version: that this code was written for.
        signatures: the types of each function's arguments.

    Raises:
        KernelError: it cannot be loaded, or is of another version or other number formats than this code.
    """

    def __init__(self, path: Path, prefix: str, version: int, signatures: dict[str, tuple[Any, ...]]) -> None:
        self.path = path
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path.name} does not load ({error})") from error
        if not hasattr(self._handle, f"{prefix}_version"):
            raise KernelError(f"{path} is another library: it has no {prefix}_version; build the kernels again")
        built = getattr(self._handle, f"{prefix}_version")()
        if built != version:
            raise KernelError(
                f"{path} is of version {built} and this code needs {version}; build the kernels again: pip install -e ."
            )
        self._status_text = getattr(self._handle, f"{prefix}_status_text")
        self._status_text.restype = c_char_p
        self._signatures = signatures
        for name, arguments in signatures.items():
            function = getattr(self._handle, name)
            function.argtypes = arguments
            function.errcheck = self._check
        index_of = getattr(self._handle, f"{prefix}_format_index")
        self.format_index = {name: index_of(name.encode()) for name in FORMATS}
        if -1 in self.format_index.values():
            raise KernelError(f"{path} was built from other number formats; build it again: pip install -e .")

    def __getattr__(self, name: str) -> Any:
        if name != "_signatures" and name in self._signatures:
            return getattr(self._handle, name)
        raise AttributeError(name)

    def _check(self, status: int, function: Any, arguments: tuple[object, ...]) -> int:
        if status != 0:
            raise KernelError(f"{function.__name__}: {self._status_text(status).decode()}")
        return status


class Library(CLibrary):
    """The CPU kernels (qlk.h).

    Raises:
        KernelError: as CLibrary; also where QLK_ISA names no instruction set, or one that this machine lacks.
    """

    def __init__(self, path: Path) -> None:
        check_isa_variable()
        super().__init__(path, "qlk", VERSION, SIGNATURES)
        self._handle.qlk_cpu_isa.restype = c_char_p
        self._handle.qlk_cpu_isas.restype = c_char_p
        wanted = os.environ.get(ISA_VARIABLE)
        if wanted is not None and wanted not in self.isas:  # the library itself would take the best there is
            raise KernelError(f"{ISA_VARIABLE} is {wanted}, and this machine has {', '.join(self.isas)}")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self._handle.qlk_cpu_isa().decode())

    @property
    def isas(self) -> tuple[str, ...]:
        """All that this machine has, best last."""
        return tuple(self._handle.qlk_cpu_isas().decode().split())

    def use_isa(self, name: str) -> None:
        """Run another instruction set, for tests and measurements.

        Raises:
            KernelError: this machine does not have it.
        """
        self.qlk_cpu_use_isa(name.encode())


def check_isa_variable() -> None:
    """Raise KernelError if QLK_ISA names no instruction set; the library itself would ignore it."""
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is not None and wanted not in ISAS:
        raise KernelError(unknown_name(f"the instruction set in {ISA_VARIABLE}", wanted, ISAS))


def library_folder() -> Path:
    """Return the folder that holds the built libraries.

    Raises:
        KernelError: there is none, with the reason.
    """
    wanted = os.environ.get(PATH_VARIABLE)
    if wanted == REFERENCE:
        raise KernelError(f"{PATH_VARIABLE}={REFERENCE} asks for it")
    package = Path(__file__).resolve().parents[2]
    folders = [Path(wanted)] if wanted else [package / "_native"]
    if not wanted:
        with suppress(PackageNotFoundError):  # an editable checkout keeps what was built elsewhere
            folders.append(Path(str(distribution("qlora_lab").locate_file(FOLDER))))
    for folder in folders:
        if (folder / FILE).is_file():
            return folder
    raise KernelError(
        f"no {FILE} in {folders[-1]}; the kernels are built by `pip install -e .` where there is a C++ compiler"
    )
