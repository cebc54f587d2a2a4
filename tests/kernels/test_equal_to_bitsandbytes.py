"""Native quantize and dequantize equal bitsandbytes byte for byte, in the formats that both have."""

import bitsandbytes.functional
import pytest
import torch

from tests.kernels.quantize_calls import Native, assert_same, c_weight, dtypes, normal

THEIRS = {"nf4": "nf4", "fp4_e2m1": "fp4"}
shared_format = pytest.mark.parametrize("fmt", THEIRS)


@shared_format
@dtypes
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        *[((7, 96), 32), ((5, 576), 64), ((192, 576), 64), ((3, 640), 128), ((3, 2048), 256), ((3, 2048), 512)],
        *[((2, 4096), 1024), ((3, 4096), 2048), ((3, 4096), 4096)],
    ],
)
def test_equals_bitsandbytes(
    native: Native, fmt: str, dtype: torch.dtype, shape: tuple[int, int], block_size: int
) -> None:
    weight = normal(shape[0] * shape[1], dtype).view(shape)
    weight.view(-1)[:block_size] = 0.0
    packed, absmax = native.quantize(weight, fmt, block_size)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=block_size, quant_type=THEIRS[fmt])
    assert_same(packed, theirs.flatten())
    assert_same(absmax, state.absmax)
    if dtype != torch.float16:  # which the C library does not write
        ours = native.dequantize(c_weight(packed, absmax, None, fmt, block_size, 0, weight.numel()), dtype)
        with torch.compiler.set_stance("force_eager"):  # it compiles for seconds from blocks of 2048 on
            assert_same(ours, bitsandbytes.functional.dequantize_4bit(theirs, state).flatten())


@shared_format
@pytest.mark.parametrize(
    ("dtype", "block_size"), [(torch.float32, 64), (torch.bfloat16, 32), (torch.float16, 64)], ids=str
)
def test_a_nested_state_equals_bitsandbytes(native: Native, fmt: str, dtype: torch.dtype, block_size: int) -> None:
    weight = normal(192 * 576, dtype).view(192, 576) * 0.03
    theirs, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=THEIRS[fmt], compress_statistics=True
    )
    packed, absmax = native.quantize(weight, fmt, block_size)
    codes, nested_absmax = native.quantize_absmax(absmax, absmax.mean(), 256)
    assert_same(packed, theirs.flatten())
    assert_same(codes, state.absmax)
    assert_same(nested_absmax, state.state2.absmax)
    nested = c_weight(packed, codes, (nested_absmax, state.offset), fmt, block_size, 256, weight.numel())
    if dtype != torch.float16:
        expected = bitsandbytes.functional.dequantize_4bit(theirs, state)
        assert_same(native.dequantize(nested, dtype), expected.flatten())
