"""Products with the output head on a machine that emulates bfloat16, against float64."""

import pytest
import torch
from torch import Tensor

from qlora_lab.models import head_products
from qlora_lab.models.head_products import ROWS_AT_ONCE, head_input_gradient, head_logits

TOKENS, HIDDEN, VOCAB = 5, 24, 2 * ROWS_AT_ONCE + 7


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "has_slow_products", lambda tensor: tensor.dtype == torch.bfloat16)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    hidden, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return hidden, weight, bias, torch.randn(TOKENS, VOCAB, generator=generator)


@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_are_rounded_no_more_than_in_float32(with_bias: bool) -> None:
    hidden, weight, bias, _ = problem()
    expected = hidden.double() @ weight.double().T + (bias.double() if with_bias else 0)
    logits = head_logits(hidden, weight, bias if with_bias else None)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_its_input_is_rounded_no_more_than_in_float32() -> None:
    _, weight, _, gradient = problem()
    found = head_input_gradient(gradient, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), gradient.double() @ weight.double(), rtol=1e-4, atol=1e-3)


def test_float32_is_multiplied_in_one_piece() -> None:
    hidden, weight, bias, gradient = (tensor.float() for tensor in problem())
    assert torch.equal(head_logits(hidden, weight, bias), torch.nn.functional.linear(hidden, weight, bias))
    assert torch.equal(head_input_gradient(gradient, weight), gradient @ weight)
