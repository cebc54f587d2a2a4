"""The fused adapter: the same numbers as its parts, gradients, dropout, registration, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.errors import ConfigError, ShapeError
from qlora_lab.ops.blockwise.op import dequantize_weight, quantize_absmax, quantize_blockwise
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.lora.dropout import RANGE, draws, drop
from qlora_lab.ops.lora.op import lora_linear

OUT, IN, RANK = 37, 65, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weight() -> PackedWeight:
    packed, absmax = quantize_blockwise(normal(OUT, IN), "nf4", 64)
    return PackedWeight(packed, *quantize_absmax(absmax, 32), "nf4", 64, 32, OUT, IN)


def adapter() -> tuple[Tensor, Tensor]:
    return normal(RANK, IN, seed=1).requires_grad_(), normal(OUT, RANK, seed=2).requires_grad_()


def plain(x: Tensor, weight: PackedWeight, bias: Tensor | None, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    """Return the product from its definition, in float64; `mask` multiplies what the adapter sees."""
    dense = dequantize_weight(weight).double()
    base = F.linear(x.double(), dense, None if bias is None else bias.double())
    return base + 0.7 * (x.double() * mask) @ A.double().T @ B.double().T


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 40)], ids=str)
def test_it_equals_its_parts_forward_and_backward(
    weight: PackedWeight, dropout: float, with_bias: bool, leading: tuple[int, ...]
) -> None:
    x = normal(*leading, IN, seed=3).requires_grad_()
    bias = normal(OUT, seed=4).requires_grad_() if with_bias else None
    A, B = adapter()
    mask = drop(torch.ones(*leading, IN), dropout, seed=11).double()
    leaves = [leaf for leaf in (x, A, B, bias) if leaf is not None]
    expected = plain(x, weight, bias, A, B, mask)
    gradient = normal(*leading, OUT, seed=5)
    expected_gradients = torch.autograd.grad(expected, leaves, gradient.double())
    actual = lora_linear(x, weight, bias, A, B, scaling=0.7, dropout=dropout, seed=11)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)
    for found, right in zip(torch.autograd.grad(actual, leaves, gradient), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), right.double(), rtol=1e-4, atol=2e-4)


def test_the_first_layer_needs_no_gradient_of_its_input(weight: PackedWeight) -> None:
    A, B = adapter()
    out = lora_linear(normal(4, IN), weight, None, A, B, scaling=0.7)
    out.sum().backward()
    assert A.grad is not None and B.grad is not None and A.grad.any() and B.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_precision(weight: PackedWeight, dtype: torch.dtype) -> None:
    A, B = adapter()
    x = normal(6, IN, seed=3).to(dtype).requires_grad_()
    out = lora_linear(x, weight, None, A, B, scaling=0.7)
    assert out.dtype == dtype
    expected = plain(x, weight, None, A, B, torch.ones(6, IN))
    torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.3)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and A.grad is not None and A.grad.dtype == torch.float32


def test_it_compiles_into_one_graph(weight: PackedWeight) -> None:
    A, B = adapter()

    def function(x: Tensor) -> Tensor:
        return lora_linear(x, weight, None, A, B, scaling=0.7, dropout=0.1, seed=3)

    x = normal(3, IN)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x), rtol=0, atol=0)


def test_backward_keeps_nothing_of_the_size_of_the_weight(weight: PackedWeight) -> None:
    kept: list[Tensor] = []
    A, B = adapter()
    x = normal(2, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(x, weight, None, A, B, scaling=0.7, dropout=0.5, seed=3)
    known = {part.data_ptr() for part in (*weight, A, B, x) if isinstance(part, Tensor)}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in known) == 2 * RANK


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = torch.ones(300_000)
    dropped = drop(x, 0.3, seed=7)
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.005)
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(dropped, drop(x, 0.3, seed=7))
    assert drop(x, 0.0, seed=7) is x


def test_draws_are_even_and_seeds_independent() -> None:
    first, second = draws(200_000, 1).double() / RANGE, draws(200_000, 2).double() / RANGE
    counts = torch.histc(first, bins=64, min=0, max=1)
    assert ((counts - 200_000 / 64) ** 2 / (200_000 / 64)).sum() < 120  # chi-square, 63 degrees of freedom
    for pair in ((first, second), (first[:-1], first[1:]), (first[:-64], first[64:])):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.01


def test_bad_adapters_are_refused(weight: PackedWeight) -> None:
    A, B = adapter()
    x = normal(2, IN)
    with pytest.raises(ShapeError, match=rf"lora_A must be \(rank, {IN}\) and lora_B \({OUT}, rank\)"):
        lora_linear(x, weight, None, B, A, scaling=1.0)
    with pytest.raises(ShapeError, match="must both be float32 or both bfloat16"):
        lora_linear(x, weight, None, A.half(), B.half(), scaling=1.0)
    with pytest.raises(ShapeError, match=r"dropout must be at least 0 and less than 1; got 1\.0"):
        lora_linear(x, weight, None, A, B, scaling=1.0, dropout=1.0)
    with pytest.raises(ShapeError, match=r"lora_A must be .*got \(\)"):
        lora_linear(x, weight, None, torch.tensor(1.0), B, scaling=1.0)
    with pytest.raises(ShapeError, match="lora_B is on meta and the weight on cpu"):
        lora_linear(x, weight, None, A, B.to("meta"), scaling=1.0)
    for seed in (2**63, -(2**63) - 1, 1.5):
        with pytest.raises(ConfigError, match=rf"seed of dropout must be an integer .*; got {seed}"):
            lora_linear(x, weight, None, A, B, scaling=1.0, dropout=0.5, seed=seed)  # type: ignore[arg-type]
