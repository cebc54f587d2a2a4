"""The machine of a test as one that multiplies bfloat16, or as one that emulates it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from qlora_lab.config import hardware
from qlora_lab.models import precision


@contextmanager
def bfloat16_units(present: bool) -> Iterator[None]:
    """Have attention and output head take this machine for one with such units or without, whatever it has."""
    units = hardware.detect().cpu_flags if present else frozenset()
    with patch.object(hardware, "BFLOAT16_CPU_FLAGS", units):
        precision.product_dtype.cache_clear()
        try:
            yield
        finally:
            precision.product_dtype.cache_clear()
