"""The CUDA kernels: on this machine's CPU, and where there is a GPU also there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lab.ops.adamw.optimizer import AdamwKernels
from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor
from qlora_lab.ops.native.cuda_adamw import CudaAdamw
from qlora_lab.ops.native.cuda_library import CUDA_FILE, CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_streams import CudaStreams, InOrder
from qlora_lab.ops.registry import CUDA_KERNELS
from tests.cuda.emulator import KERNELS, build, why_not


class OneQueue:
    """`cuda_streams.Streams` where nothing runs beside anything else."""

    @contextmanager
    def queue(self, device: torch.device) -> Iterator[int]:
        yield 0

    def ahead(self, device: torch.device, panels: int) -> InOrder:
        return InOrder(0)


def _streams() -> CudaStreams:
    assert CUDA_KERNELS.streams is not None
    return CUDA_KERNELS.streams


class OpsOnGpu:
    """The ops on CPU tensors that go to the GPU and back."""

    def __init__(self, library: CudaLibrary) -> None:
        self._ops = CudaOps(library, _streams())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            moved = [value.cuda() if isinstance(value, Tensor) else value for value in arguments]
            result = getattr(self._ops, name)(*moved)
            return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

        return call


class AdamwOnGpu:
    """AdamW's kernels on CPU tensors that go to the GPU and back."""

    def __init__(self, library: CudaLibrary) -> None:
        self._kernels = CudaAdamw(library, _streams())

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        return self._kernels.gradient_norm([gradient.cuda() for gradient in gradients], gradient_scale)

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        moved = [
            AdamwTensor(*[value.cuda() if isinstance(value, Tensor) else value for value in tensor])
            for tensor in tensors
        ]
        self._kernels.update(moved, step)
        for before, after in zip(tensors, moved, strict=True):
            for target, value in zip(before, after, strict=True):
                if isinstance(target, Tensor):
                    target.copy_(value)


PLACES = ["emulated"]
if CUDA_KERNELS.library is not None:
    PLACES.append(pytest.param("gpu", marks=pytest.mark.gpu))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def emulated() -> CudaLibrary:
    """The library of kernels/cuda, its kernels running as fibres of this process."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return CudaLibrary(build(CUDA_FILE, KERNELS / "emu" / "misbehave.cpp"))


@pytest.fixture
def streams() -> OneQueue:
    return OneQueue()


@pytest.fixture(params=PLACES)
def ops(request: pytest.FixtureRequest) -> CudaOps | OpsOnGpu:
    """The ops of CUDA tensors, on CPU tensors."""
    if request.param == "gpu":
        assert CUDA_KERNELS.library is not None
        return OpsOnGpu(CUDA_KERNELS.library)
    return CudaOps(request.getfixturevalue("emulated"), OneQueue())


@pytest.fixture(params=PLACES)
def adamw_kernels(request: pytest.FixtureRequest) -> AdamwKernels:
    """AdamW's CUDA kernels, on CPU tensors."""
    if request.param == "gpu":
        assert CUDA_KERNELS.library is not None
        return AdamwOnGpu(CUDA_KERNELS.library)
    return CudaAdamw(request.getfixturevalue("emulated"), OneQueue())
