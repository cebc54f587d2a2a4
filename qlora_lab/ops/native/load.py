"""Which kernels run the ops: chosen once, when the ops are first imported, and told to whoever asks."""

from dataclasses import dataclass

import torch

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.ctypes_ops import CtypesOps
from qlora_lab.ops.native.library import Library, library_folder

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


@dataclass(frozen=True)
class Kernels:
    """What runs the ops on CPU tensors.

    Attributes:
        library: the C library; None where the references run.
        binding: "stable ABI", "ctypes" or "none".
        reason: why it is not something faster; empty if nothing is.
    """

    library: Library | None
    binding: str
    reason: str

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
        return Kernels(None, "none", str(error))
    try:
        torch.ops.load_library(folder / BINDING_FILE)
        return Kernels(library, "stable ABI", "")
    except OSError as error:
        reason = str(error).splitlines()[0] if (folder / BINDING_FILE).exists() else f"{BINDING_FILE} was not built"
    ops = CtypesOps(library)
    for name in OPS:
        torch_library.impl(name, getattr(ops, name), "CPU")
    return Kernels(library, "ctypes", reason)
