"""The CUDA kernels on this machine's CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.cuda.emulator import build, why_not

from qlora_lab.ops.native.cuda_library import CUDA_FILE, CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps, InOrder


class OneQueue:
    """`cuda_ops.Streams` where nothing runs beside anything else."""

    @contextmanager
    def queue(self, device: torch.device) -> Iterator[int]:
        yield 0

    def ahead(self, device: torch.device, panels: int) -> InOrder:
        return InOrder(0)


@pytest.fixture(scope="session")
def emulated() -> CudaLibrary:
    """The library of kernels/cuda, its kernels running as fibres of this process."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return CudaLibrary(build(CUDA_FILE))


@pytest.fixture
def streams() -> OneQueue:
    return OneQueue()


@pytest.fixture
def ops(emulated: CudaLibrary, streams: OneQueue) -> CudaOps:
    """The ops of CUDA tensors, on CPU tensors."""
    return CudaOps(emulated, streams)
