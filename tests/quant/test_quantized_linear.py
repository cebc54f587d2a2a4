"""The quantized layer: what it computes, how it moves, and how it is saved."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lab.errors import ConfigError, ModelError, ShapeError
from qlora_lab.ops.formats import FORMATS
from qlora_lab.quant.linear import QuantizedLinear, cached_weights

OPTIONS: dict[str, Any] = {
    "format": "nf4",
    "block_size": 64,
    "double_quant": True,
    "double_quant_block_size": 256,
    "compute_dtype": torch.float32,
}


def dense(in_features: int = 96, out_features: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


def layer(**changes: Any) -> QuantizedLinear:
    return QuantizedLinear.from_linear(dense(), **(OPTIONS | changes))


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_computes_with_its_dequantized_weight(format: str, double_quant: bool) -> None:
    linear = layer(format=format, double_quant=double_quant)
    expected = F.linear(batch(), linear.dequantize(), dense().bias)
    assert torch.equal(linear(batch()), expected)


@pytest.mark.parametrize(
    ("format", "largest_error"),
    # The widest gap between levels: a weight of a block's absmax is off by half of it at most.
    [
        *(("nf4", 0.304), ("fp4_e2m1", 1 / 3), ("fp4_e3m0", 0.5), ("int4", 1 / 7), ("int8", 1 / 127)),
        *(("nf3", 0.465), ("nf2", 1.0)),
    ],
)
def test_stays_near_the_weight_it_was_made_from(format: str, largest_error: float) -> None:
    weight = dense().weight.detach()
    error = (layer(format=format, double_quant=False).dequantize() - weight).view(-1, 64)
    absmax = weight.view(-1, 64).abs().amax(dim=1, keepdim=True)
    assert (error.abs() <= absmax * (largest_error / 2 + 1e-6)).all()
    assert error.abs().max() > 0


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_casts_to_the_compute_dtype_and_back(compute_dtype: torch.dtype, dtype: torch.dtype) -> None:
    linear = layer(compute_dtype=compute_dtype)
    weight, bias = linear.dequantize(), dense().bias.to(compute_dtype)
    assert weight.dtype == compute_dtype
    expected = F.linear(batch(dtype).to(compute_dtype), weight, bias).to(dtype)
    actual = linear(batch(dtype))
    assert actual.dtype == dtype
    tolerance = 8 * max(torch.finfo(compute_dtype).eps, torch.finfo(dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_gradient_reaches_the_input_and_the_bias_only() -> None:
    linear = layer()
    x = batch().requires_grad_()
    linear(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert linear.bias is not None and linear.bias.grad is not None


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_round_trip(double_quant: bool) -> None:
    source = layer(double_quant=double_quant)
    target = QuantizedLinear(96, 40, bias=True, **(OPTIONS | {"double_quant": double_quant}))
    state = source.state_dict()
    parts = ["absmax", "bias", "packed"] + (["nested_absmax", "offset"] if double_quant else [])
    assert sorted(state) == sorted(parts)
    target.load_state_dict(state)
    assert torch.equal(target(batch()), source(batch()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_an_empty_layer_has_the_shapes_of_a_filled_one(format: str, double_quant: bool) -> None:
    changes = {"format": format, "double_quant": double_quant}
    empty = QuantizedLinear(96, 40, bias=True, device="meta", **(OPTIONS | changes))
    filled = layer(**changes)
    assert {name: (part.shape, part.dtype) for name, part in empty.state_dict().items()} == {
        name: (part.shape, part.dtype) for name, part in filled.state_dict().items()
    }
    assert all(part.is_meta for part in empty.state_dict().values())
    assert empty(batch().to("meta")).shape == (2, 5, 40)


def test_an_empty_layer_on_meta_is_filled_by_load_weight() -> None:
    empty = QuantizedLinear(96, 40, bias=False, device="meta", **OPTIONS)
    empty.load_weight(dense().weight)
    assert torch.equal(empty.dequantize(), layer().dequantize())


def test_casting_the_model_leaves_the_quantized_weight_alone() -> None:
    linear = layer()
    before = linear.dequantize()
    linear.to(torch.bfloat16)
    assert linear.nested_absmax is not None and linear.nested_absmax.dtype == torch.float32
    assert torch.equal(linear.dequantize(), before)
    assert linear.bias is not None and linear.bias.dtype == torch.bfloat16
    assert torch.equal(layer(double_quant=False).half().dequantize(), layer(double_quant=False).dequantize())


def test_moves_to_another_device_as_a_whole() -> None:
    moved = layer().to("meta")
    assert all(part.is_meta for part in moved.state_dict().values())
    assert moved.nested_absmax is not None and moved.nested_absmax.dtype == torch.float32


def test_a_copy_computes_the_same() -> None:
    linear = layer()
    assert torch.equal(copy.deepcopy(linear)(batch()), linear(batch()))


def test_weight_tells_shape_and_dtype_at_no_cost() -> None:
    weight = layer(compute_dtype=torch.bfloat16).weight
    assert (weight.shape, weight.dtype, weight.is_meta) == ((40, 96), torch.bfloat16, True)


def test_repr_says_how_it_is_quantized() -> None:
    assert repr(layer()) == (
        "QuantizedLinear(in_features=96, out_features=40, bias=True, format=nf4, block_size=64, "
        "double_quant=True, compute_dtype=float32)"
    )


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nf4'"):
        layer(format="nf")
    with pytest.raises(ConfigError, match="block_size must be a power of two"):
        layer(block_size=100)
    with pytest.raises(ConfigError, match="double_quant_block_size must be a power of two"):
        layer(double_quant_block_size=16)
    with pytest.raises(ConfigError, match="compute_dtype must be one of"):
        layer(compute_dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"must have shape \(40, 96\); got \(96, 40\)"):
        layer().load_weight(torch.zeros(96, 40))
    broken = dense()
    broken.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        QuantizedLinear.from_linear(broken, **OPTIONS)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_cached_weights_give_the_same_numbers(compute_dtype: torch.dtype, bias: bool) -> None:
    options = OPTIONS | {"compute_dtype": compute_dtype}
    model = nn.Sequential(
        QuantizedLinear.from_linear(dense(bias=bias), **options),
        nn.GELU(),
        QuantizedLinear.from_linear(dense(40, 24, bias=bias), **options),
    )
    expected = model(batch())
    with cached_weights(model):
        cached = model(batch())
        assert all(layer._dense_weight is not None for layer in model if isinstance(layer, QuantizedLinear))
    tolerance = 8 * torch.finfo(compute_dtype).eps
    torch.testing.assert_close(cached, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(model(batch()), expected)


def test_cached_weights_are_expanded_once_and_released_even_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = layer()
    expanded: list[QuantizedLinear] = []
    original = QuantizedLinear.dequantize

    def dequantize(self: QuantizedLinear) -> Tensor:
        expanded.append(self)
        return original(self)

    monkeypatch.setattr(QuantizedLinear, "dequantize", dequantize)
    with pytest.raises(RuntimeError, match="stop"), cached_weights(linear):
        with cached_weights(linear):  # inside generation inside evaluation
            linear(batch())
        assert linear._dense_weight is not None
        linear(batch())
        raise RuntimeError("stop")
    assert expanded == [linear]
    assert linear._dense_weight is None
    assert "_dense_weight" not in linear.state_dict()
