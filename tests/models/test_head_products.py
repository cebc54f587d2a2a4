"""Products with the output head against float64: by native kernels, and by torch where bfloat16 is emulated."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from qlora_lab.models import head_products
from qlora_lab.models.head_products import ROWS_AT_ONCE, head_input_gradient, head_logits
from qlora_lab.ops.native.load import Kernels
from qlora_lab.ops.registry import KERNELS

TOKENS, HIDDEN, VOCAB = 5, 24, 2 * ROWS_AT_ONCE + 7
NATIVE, EMULATED = "native", "torch, emulated"


@pytest.fixture(params=[NATIVE, EMULATED])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How heads are multiplied during the test."""
    if request.param == EMULATED:
        monkeypatch.setattr(head_products, "KERNELS", Kernels(None, "none", "a test"))
        monkeypatch.setattr(head_products, "has_slow_products", lambda tensor: tensor.dtype == torch.bfloat16)
    elif KERNELS.library is None:
        pytest.skip(f"no native kernels: {KERNELS.reason}")
    return str(request.param)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    hidden, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return hidden, weight, bias, torch.randn(TOKENS, VOCAB, generator=generator)


@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_are_rounded_no_more_than_in_float32(way: str, with_bias: bool) -> None:
    hidden, weight, bias, _ = problem()
    expected = hidden.double() @ weight.double().T + (bias.double() if with_bias else 0)
    logits = head_logits(hidden, weight, bias if with_bias else None)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_its_input_is_rounded_no_more_than_in_float32(way: str) -> None:
    _, weight, _, gradient = problem()
    if way == NATIVE and KERNELS.library is not None and KERNELS.library.isa == "avx512_bf16":
        gradient = gradient.bfloat16().float()  # as the units take it
    found = head_input_gradient(gradient, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), gradient.double() @ weight.double(), rtol=1e-4, atol=1e-3)


def test_float32_is_as_torch_multiplies_it(way: str) -> None:
    hidden, weight, bias, gradient = (tensor.float() for tensor in problem())
    expected = torch.nn.functional.linear(hidden, weight, bias), gradient @ weight
    found = head_logits(hidden, weight, bias), head_input_gradient(gradient, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)
    if way == EMULATED:  # in one piece
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_autocast_says_in_which_dtype_a_head_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "without_slow_autocast", lambda _device: nullcontext())
    hidden, weight, _, _ = (tensor.float() for tensor in problem())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_logits(hidden, weight, None)
    assert torch.equal(found, found.bfloat16().float()) and not torch.equal(found, hidden @ weight.T)
