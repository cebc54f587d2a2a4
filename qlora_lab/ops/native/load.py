"""Which kernels run the ops: chosen once, when the ops are first imported, and told to whoever asks."""

import os
from dataclasses import dataclass

import torch

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.ctypes_ops import CtypesOps
from qlora_lab.ops.native.cuda_library import CUDA_FILE, CudaLibrary, cuda_version
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_streams import CudaStreams
from qlora_lab.ops.native.library import ISA_VARIABLE, PATH_VARIABLE, REFERENCE, Library, library_folder

BINDING_FILE = "libqlk_torch.so"
OPS = (
    "quantize_blockwise",
    "dequantize_weight",
    "dequantize_weight_into",
    "quantize_absmax",
    "dequantize_absmax",
    "quantized_linear",
    "quantized_linear_grad_input",
    "lora_linear",
    "lora_linear_backward",
)
DIFFERENTIABLE = ("quantized_linear", "quantized_linear_grad_input", "lora_linear")


def kernel_of(op: str) -> str:
    """Return the name under which what computes an op is registered; see `registry.register_differentiable`."""
    return f"{op}_kernel" if op in DIFFERENTIABLE else op


@dataclass(frozen=True)
class Kernels:
    """What runs the ops on CPU tensors.

    Attributes:
        library: the C library; None where the references run.
        binding: "stable ABI", "ctypes" or "none".
        reason: why it is not something faster; empty if nothing is.
        asked: what a variable asks for and cannot be had, so that a run must not take something slower; or empty.
    """

    library: Library | None
    binding: str
    reason: str
    asked: str = ""

    def require(self) -> None:
        """Raise KernelError where a variable asks for kernels that cannot be had."""
        _require(self.asked, self.reason)

    def __str__(self) -> str:
        """One line for the start of a run and its record."""
        if self.library is None:
            return f"reference (pure torch): {self.reason}"
        because = f": {self.reason}" if self.reason else ""
        return f"native {self.library.isa} ({self.binding}{because})"


def load_kernels(torch_library: torch.library.Library) -> Kernels:
    """Register the fastest kernels there are for CPU tensors on `torch_library`, below the references."""
    try:
        folder = library_folder()
        library = Library(folder / "libqlk_cpu.so")
    except KernelError as error:
        return Kernels(None, "none", str(error), _asked())
    try:
        torch.ops.load_library(folder / BINDING_FILE)
        return Kernels(library, "stable ABI", "")
    except OSError as error:
        reason = str(error).splitlines()[0] if (folder / BINDING_FILE).exists() else f"{BINDING_FILE} was not built"
    ops = CtypesOps(library)
    for name in OPS:
        torch_library.impl(kernel_of(name), getattr(ops, name), "CPU")
    return Kernels(library, "ctypes", reason)


def _asked() -> str:
    """Return the variables that choose native kernels, as they are set; none counts beside REFERENCE."""
    if os.environ.get(PATH_VARIABLE) == REFERENCE:
        return ""
    is_set = {PATH_VARIABLE: bool(os.environ.get(PATH_VARIABLE)), ISA_VARIABLE: ISA_VARIABLE in os.environ}
    chosen = [name for name, on in is_set.items() if on]
    return " ".join(f"{name}={os.environ[name]}" for name in chosen)


def _require(asked: str, reason: str) -> None:
    if asked:
        raise KernelError(f"{asked}: {reason}; unset it for what this machine has")


SMALLEST_CAPABILITY = 80  # what the CUDA kernels are compiled for, and everything newer


@dataclass(frozen=True)
class CudaKernels:
    """What runs the ops on CUDA tensors.

    Attributes:
        library: the C library; None where the references run.
        streams: torch's, for whoever queues work of the library; None without it.
        reason: why the references run; empty if they do not.
        asked: the variable that names a folder without kernels for the GPU that is there; or empty.
    """

    library: CudaLibrary | None
    streams: CudaStreams | None
    reason: str
    asked: str = ""

    def require(self) -> None:
        """Raise KernelError where a variable asks for kernels that cannot be had."""
        _require(self.asked, self.reason)

    def __str__(self) -> str:
        """One line for the start of a run and its record."""
        if self.library is None:
            return f"reference (pure torch): {self.reason}"
        built, driver = cuda_version(self.library.runtime), cuda_version(self.library.driver)
        return f"native CUDA (built with {built}, the driver knows {driver})"


def load_cuda_kernels(torch_library: torch.library.Library) -> CudaKernels:
    """Register the CUDA kernels for CUDA tensors on `torch_library`, where there is a GPU and a library for it."""
    try:
        library = find_cuda_library()
    except KernelError as error:
        folder = os.environ.get(PATH_VARIABLE, "")
        is_asked = folder not in ("", REFERENCE) and torch.version.cuda is not None and torch.cuda.is_available()
        return CudaKernels(None, None, str(error), f"{PATH_VARIABLE}={folder}" if is_asked else "")
    streams = CudaStreams(library.qlk_cuda_use_device)
    ops = CudaOps(library, streams)
    for name in OPS:
        torch_library.impl(kernel_of(name), getattr(ops, name), "CUDA")
    return CudaKernels(library, streams, "")


def find_cuda_library() -> CudaLibrary:
    """Return the library of the CUDA kernels.

    Raises:
        KernelError: why there is none that could run.
    """
    if os.environ.get(PATH_VARIABLE) == REFERENCE:
        raise KernelError(f"{PATH_VARIABLE}={REFERENCE} asks for it")
    if torch.version.cuda is None:
        raise KernelError("torch was built without CUDA")
    if not torch.cuda.is_available():
        raise KernelError("torch finds no GPU that it can use; `nvidia-smi` shows the driver and the GPUs")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < SMALLEST_CAPABILITY:
        raise KernelError(f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or more")
    path = library_folder() / CUDA_FILE
    if not path.exists():
        raise KernelError(f"no {CUDA_FILE} in {path.parent}; `pip install -e .` builds it where it finds nvcc")
    return CudaLibrary(path)
