"""The registered ops: schema, fake kernels, autograd, compilation, and what they refuse."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.errors import ConfigError, ShapeError
from qlora_lab.ops.blockwise import tables
from qlora_lab.ops.blockwise.op import (
    dequantize_absmax,
    dequantize_blockwise,
    dequantize_weight,
    quantize_absmax,
    quantize_blockwise,
    quantized_linear,
)
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.formats import FORMATS

OUT, IN = 37, 65  # neither a multiple of a block
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
every_format = pytest.mark.parametrize("fmt", FORMATS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(fmt: str, nested: bool) -> tuple[PackedWeight, Tensor]:
    """Return a random weight in blocks of 64, its absmax perhaps again in blocks of 32, and what it stands for."""
    packed, absmax = quantize_blockwise(normal(OUT, IN), fmt, 64)
    if not nested:
        dense = dequantize_blockwise(packed, absmax, fmt, 64, OUT * IN).view(OUT, IN)
        return PackedWeight(packed, absmax, None, None, fmt, 64, 32, OUT, IN), dense
    codes, nested_absmax, offset = quantize_absmax(absmax, 32)
    restored = dequantize_absmax(codes, nested_absmax, offset, 32)
    dense = dequantize_blockwise(packed, restored, fmt, 64, OUT * IN).view(OUT, IN)
    return PackedWeight(packed, codes, nested_absmax, offset, fmt, 64, 32, OUT, IN), dense


def test_a_weight_without_columns_gives_the_bias_and_one_without_rows_zeros() -> None:
    nothing, bias = (
        PackedWeight(torch.empty(0, dtype=torch.uint8), torch.empty(0), None, None, "nf4", 64, 256, OUT, 0),
        normal(OUT),
    )
    assert torch.equal(quantized_linear(torch.empty(2, 3, 0), nothing, bias), bias.expand(2, 3, OUT))
    x = normal(2, 3, IN).requires_grad_()
    out = quantized_linear(x, nothing._replace(out_features=0, in_features=IN))
    assert out.shape == (2, 3, 0)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3, IN))


@every_format
@nested_or_not
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0, 4)], ids=str)
def test_linear_equals_the_dense_one_in_forward_and_backward(fmt: str, nested: bool, leading: tuple[int, ...]) -> None:
    weight, dense = quantized(fmt, nested)
    x, bias = normal(*leading, IN).requires_grad_(), normal(OUT, seed=1).requires_grad_()
    dense_x, dense_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    actual = quantized_linear(x, weight, bias)
    expected = F.linear(dense_x, dense, dense_bias)
    torch.testing.assert_close(actual, expected)  # the same product of the same numbers, summed in another order

    gradient = normal(*actual.shape, seed=2)
    actual.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, dense_x.grad)  # summed in another order
    torch.testing.assert_close(bias.grad, dense_bias.grad)


def test_second_derivative_equals_the_dense_one() -> None:
    weight, dense = quantized("nf4", nested=False)

    def second(linear: Any) -> Tensor:
        x = normal(3, IN).requires_grad_()
        (gradient,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    actual = second(lambda x: quantized_linear(x, weight))
    torch.testing.assert_close(actual, second(lambda x: F.linear(x, dense)), rtol=1e-4, atol=5e-2)


def test_backward_keeps_the_packed_weight_and_nothing_larger() -> None:
    weight, _ = quantized("nf4", nested=True)
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = normal(4, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        quantized_linear(x, weight)
    assert {tensor.data_ptr() for tensor in saved} == {part.data_ptr() for part in weight if isinstance(part, Tensor)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_half_precision(dtype: torch.dtype) -> None:
    weight, dense = quantized("nf4", nested=True)
    x, bias = normal(5, IN).to(dtype), normal(OUT)
    actual = quantized_linear(x, weight, bias)
    assert actual.dtype == dtype
    expected = F.linear(x.double(), dense.double(), bias.double())
    torch.testing.assert_close(actual.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0.05)


def test_autocast_does_not_change_the_dtype_of_the_computation() -> None:
    weight, dense = quantized("nf4", nested=False)
    x = normal(5, IN).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = quantized_linear(x, weight)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, F.linear(x, dense), rtol=1e-5, atol=1e-5)


def test_meta_tensors_give_shapes_without_data() -> None:
    weight, _ = quantized("nf4", nested=True)
    parts = (part.to("meta") if isinstance(part, Tensor) else part for part in weight)
    result = quantized_linear(torch.empty(2, 3, IN, device="meta"), PackedWeight(*parts))
    assert result.shape == (2, 3, OUT) and result.is_meta


def test_linear_compiles_into_one_graph() -> None:
    weight, _ = quantized("nf4", nested=True)

    def function(x: Tensor) -> Tensor:
        return quantized_linear(x, weight)

    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        x = normal(3, IN).requires_grad_()
        run(x).sum().backward()
        results.append((run(x), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)  # the op is opaque to the compiler


def test_tables_made_under_inference_mode_serve_training() -> None:
    x = normal(2, IN).requires_grad_()
    for table in (tables.encode_table, tables.decode_table, tables.dynamic_map):
        table.cache_clear()
    with torch.inference_mode():
        packed, absmax = quantize_blockwise(normal(OUT, IN), "fp4_e3m0", 64)
        dequantize_blockwise(packed, absmax, "fp4_e3m0", 64, OUT * IN)
        dequantize_absmax(*quantize_absmax(absmax))
    assert not tables.decode_table(FORMATS["fp4_e3m0"], x.device).is_inference()
    weight, dense = quantized("fp4_e3m0", nested=True)
    quantized_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(dim=0).expand(2, IN))


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192])
def test_block_size_is_a_power_of_two_in_range(block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"power of two from 32 to 4096; got {block_size}"):
        quantize_blockwise(normal(64), "nf4", block_size)
    with pytest.raises(ConfigError, match=f"got {block_size}"):
        quantize_absmax(normal(64), block_size)


def test_quantize_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nf4'"):
        quantize_blockwise(normal(64), "nf", 64)
    with pytest.raises(ConfigError, match="must be one of float32, bfloat16, float16; got float64"):
        quantize_blockwise(normal(64).double(), "nf4", 64)
    with pytest.raises(ShapeError, match="no elements"):
        quantize_blockwise(torch.empty(0, 64), "nf4", 64)
    with pytest.raises(ShapeError, match="float32 vector; got bfloat16 of shape"):
        quantize_absmax(normal(2, 3).bfloat16())
    with pytest.raises(ConfigError, match=r"block_size must be a power of two from 32 to 4096; got 64\.0"):
        quantize_blockwise(normal(64), "nf4", 64.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a tensor of torch; got ndarray"):
        quantize_blockwise(normal(64).numpy(), "nf4", 64)  # type: ignore[arg-type]


def test_dequantize_refuses_parts_that_do_not_belong_together() -> None:
    packed, absmax = quantize_blockwise(normal(256), "nf4", 64)
    with pytest.raises(ShapeError, match="256 weights make 2 blocks of 128, but absmax has 4"):
        dequantize_blockwise(packed, absmax, "nf4", 128, 256)
    with pytest.raises(ShapeError, match="256 weights in int8 take 256 bytes"):
        dequantize_blockwise(packed, absmax, "int8", 64, 256)
    with pytest.raises(ConfigError, match="got float64"):
        dequantize_blockwise(packed, absmax, "nf4", 64, 256, torch.float64)
    codes, nested_absmax, offset = quantize_absmax(normal(300).abs(), 256)
    with pytest.raises(ShapeError, match="300 absmax codes make 5 blocks of 64"):
        dequantize_absmax(codes, nested_absmax, offset, 64)
    with pytest.raises(ShapeError, match="it is float32"):
        dequantize_absmax(normal(300), nested_absmax, offset, 256)
    with pytest.raises(ShapeError, match="must be float32; got float64 and float32"):
        dequantize_absmax(codes, nested_absmax.double(), offset, 256)
    with pytest.raises(ShapeError, match="must be float32; got float32 and int64"):
        dequantize_absmax(codes, nested_absmax, offset.long(), 256)


def test_dequantize_refuses_an_out_of_another_shape() -> None:
    weight, dense = quantized("nf4", nested=True)
    out = torch.full((OUT, IN), torch.nan)
    assert dequantize_weight(weight, out=out) is out
    assert torch.equal(out, dense)
    with pytest.raises(ShapeError, match=rf"contiguous of shape \({OUT}, {IN}\); got \({IN}, {OUT}\)"):
        dequantize_weight(weight, out=out.view(IN, OUT))
    with pytest.raises(ShapeError, match="must be contiguous"):
        dequantize_weight(weight, out=torch.empty(IN, OUT).T)
    with pytest.raises(ShapeError, match="out is on meta and the weight on cpu"):
        dequantize_weight(weight, out=torch.empty(OUT, IN, device="meta"))


def test_linear_refuses_parts_that_do_not_belong_together() -> None:
    weight, _ = quantized("nf4", nested=False)
    with pytest.raises(ShapeError, match=rf"x must have {IN} features in its last dimension; got shape \(2, {OUT}\)"):
        quantized_linear(normal(2, OUT), weight)
    with pytest.raises(ShapeError, match=rf"bias must have shape \({OUT},\); got \({IN},\)"):
        quantized_linear(normal(2, IN), weight, normal(IN))
    with pytest.raises(ConfigError, match=r"the dtype of bias must be one of .*; got int64"):
        quantized_linear(normal(2, IN), weight, torch.zeros(OUT, dtype=torch.int64))
    with pytest.raises(ShapeError, match="bias is on meta and the weight on cpu"):
        quantized_linear(normal(2, IN), weight, torch.zeros(OUT, device="meta"))
    with pytest.raises(ShapeError, match="got only one of them"):
        quantized_linear(normal(2, IN), weight._replace(nested_absmax=normal(1)))
    with pytest.raises(ShapeError, match="must be float32 unless"):
        quantized_linear(normal(2, IN), weight._replace(absmax=weight.absmax.byte()))
    with pytest.raises(ShapeError, match="but packed is"):
        quantized_linear(normal(2, IN), weight._replace(packed=weight.packed[1:]))
    with pytest.raises(ConfigError, match="the dtype of x"):
        quantized_linear(normal(2, IN).double(), weight)
    with pytest.raises(ShapeError, match=r"x must have .*; got shape \(\)"):
        quantized_linear(torch.tensor(1.0), weight)
    with pytest.raises(ShapeError, match=r"cannot have a shape of \(-\d+, -\d+\)"):
        quantized_linear(normal(2, IN), weight._replace(out_features=-OUT, in_features=-IN))


def test_linear_refuses_a_weight_of_another_device() -> None:
    weight, _ = quantized("nf4", nested=False)
    nowhere = weight._replace(packed=weight.packed.to("meta"))
    with pytest.raises(ShapeError, match="packed is on meta and absmax on cpu; a tensor on meta has no values"):
        quantized_linear(normal(2, IN), nowhere)
    with pytest.raises(ShapeError, match="x is on cpu and the weight on meta"):
        quantized_linear(normal(2, IN), nowhere._replace(absmax=weight.absmax.to("meta")))
