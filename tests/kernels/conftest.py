"""The built C library, once for each instruction set of this machine."""

import ctypes
from collections.abc import Iterator

import pytest

from qlora_lab.ops.native.library import ISAS
from qlora_lab.ops.registry import KERNELS
from tests.kernels.quantize_calls import Native


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of this machine; the library runs it during the test."""
    library = KERNELS.library
    if library is None:
        pytest.skip(f"no native kernels: {KERNELS.reason}")
    if request.param not in library.isas:
        pytest.skip(f"this machine has no {request.param}")
    before = library.isa
    library.use_isa(request.param)
    yield request.param
    library.use_isa(before)


@pytest.fixture
def library(isa: str) -> ctypes.CDLL:
    """The library without our checks of its status, running `isa`."""
    assert KERNELS.library is not None
    return ctypes.CDLL(str(KERNELS.library.path))


@pytest.fixture
def native(library: ctypes.CDLL) -> Native:
    return Native(library)
