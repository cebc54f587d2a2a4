"""The C library of the CUDA kernels (kernels/include/qlk_cuda.h) through ctypes."""

import ctypes
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.cuda_plan import Device
from qlora_lab.ops.native.library import WEIGHT, AdapterView, CLibrary

VERSION = 5  # QLK_CUDA_VERSION of kernels/include/qlk_cuda.h
CUDA_FILE = "libqlk_cuda.so"


class PropertiesView(ctypes.Structure):
    """struct qlk_cuda_properties."""

    _fields_ = (
        ("multiprocessors", c_int32),
        ("l2_bytes", c_int32),
        ("capability", c_int32),
        ("concurrent_managed_access", c_int32),
    )


class CudaAdapterView(ctypes.Structure):
    """struct qlk_cuda_adapter."""

    _fields_ = (*AdapterView._fields_, ("dtype", c_int32))


class LowRankView(ctypes.Structure):
    """struct qlk_cuda_low_rank."""

    _fields_ = (
        ("rows", c_int64),
        ("in_features", c_int64),
        ("rank", c_int64),
        ("seed", c_uint64),
        ("dropout", c_float),
        ("dtype", c_int32),
    )


ADAPTER, LOW_RANK = POINTER(CudaAdapterView), POINTER(LowRankView)
# Pointers to device memory are numbers; the last argument of a kernel is its stream.
SIGNATURES = {
    "qlk_cuda_quantize": (c_void_p, c_int, c_int64, c_int, c_int64, c_void_p, c_void_p, c_void_p),
    "qlk_cuda_dequantize": (WEIGHT, c_int, *[c_int64] * 4, c_void_p, c_void_p),
    "qlk_cuda_quantize_absmax": (c_void_p, c_int64, c_int64, *[c_void_p] * 4),
    "qlk_cuda_dequantize_absmax": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "qlk_cuda_drop": (c_void_p, c_int, c_int64, c_float, c_uint64, c_void_p, c_void_p, c_void_p),
    "qlk_cuda_lora_down": (c_void_p, c_int, c_int64, c_int64, ADAPTER, c_void_p, c_void_p),
    "qlk_cuda_linear_few_rows": (c_void_p, c_int, c_int64, WEIGHT, c_void_p, ADAPTER, *[c_void_p] * 3),
    "qlk_cuda_linear_tiles": (c_void_p, c_int, c_int64, WEIGHT, c_void_p, ADAPTER, *[c_void_p] * 3),
    "qlk_cuda_low_rank_down": (LOW_RANK, c_void_p, c_void_p, c_int64, *[c_void_p] * 4),
    "qlk_cuda_low_rank_grad_A": (LOW_RANK, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_void_p),
    "qlk_cuda_low_rank_add": (LOW_RANK, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    "qlk_cuda_gradient_norm": (c_void_p, c_void_p, c_int64, c_int64, c_double, *[c_void_p] * 3),
    "qlk_cuda_adamw": (c_void_p, c_void_p, c_int64, c_int64, *[c_double] * 5, c_int64, c_int64, c_void_p),
    "qlk_cuda_use_device": (c_int,),
    "qlk_cuda_device_properties": (c_int, POINTER(PropertiesView)),
    "qlk_cuda_managed_allocate": (c_int64, c_int, POINTER(c_void_p)),
    "qlk_cuda_managed_free": (c_void_p,),
    "qlk_cuda_managed_prefetch": (c_void_p, c_int64, c_int, c_void_p),
    "qlk_cuda_managed_location": (c_void_p, c_int64, POINTER(c_int), POINTER(c_int)),
}


class CudaLibrary(CLibrary):
    """The CUDA kernels (qlk_cuda.h).

    Raises:
        KernelError: as CLibrary; also where the driver is too old for it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "qlk_cuda", VERSION, SIGNATURES)
        self.driver, self.runtime = self._handle.qlk_cuda_driver_version(), self._handle.qlk_cuda_runtime_version()
        check_driver(self.driver, self.runtime)

    def device(self, index: int) -> Device:
        """Return what the choice of a kernel depends on."""
        view = PropertiesView()
        self.qlk_cuda_device_properties(index, view)
        return Device(view.multiprocessors, view.l2_bytes, view.capability, bool(view.concurrent_managed_access))


def check_driver(driver: int, runtime: int) -> None:
    """Raise KernelError unless a driver of this CUDA version runs a library built with that one.

    Within one major version, newer libraries run on older drivers; a driver of an older major version refuses them.
    """
    if driver == 0:
        raise KernelError("there is no NVIDIA driver")
    if driver // 1000 < runtime // 1000:
        raise KernelError(
            f"the NVIDIA driver knows CUDA {cuda_version(driver)} and the kernels were built with "
            f"{cuda_version(runtime)}; update the driver, or build them again with an nvcc of CUDA {driver // 1000}"
        )


def cuda_version(number: int) -> str:
    """Return 13000 as `13.0`."""
    return f"{number // 1000}.{number % 1000 // 10}"
