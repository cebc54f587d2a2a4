"""Expanded weights are kept for small models only."""

import pytest
import torch
from torch import nn

from qlora_lab.evaluation.weights import cached_if_small, dense_bytes
from qlora_lab.quant.linear import QuantizedLinear


def quantized(compute_dtype: torch.dtype) -> nn.Sequential:
    layer = QuantizedLinear.from_linear(
        nn.Linear(64, 32),
        format="nf4",
        block_size=64,
        double_quant=False,
        double_quant_block_size=256,
        compute_dtype=compute_dtype,
    )
    return nn.Sequential(layer, nn.Linear(32, 32))  # a dense layer needs nothing more


def test_dense_bytes_count_quantized_weights_in_their_compute_dtype() -> None:
    assert dense_bytes(quantized(torch.float32)) == 64 * 32 * 4
    assert dense_bytes(quantized(torch.bfloat16)) == 64 * 32 * 2


@pytest.mark.parametrize(("limit_bytes", "kept"), [(64 * 32 * 4, True), (64 * 32 * 4 - 1, False)])
def test_weights_are_kept_up_to_the_limit(limit_bytes: int, kept: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = quantized(torch.float32)
    with cached_if_small(model, limit_bytes):
        assert (model[0]._dense_weight is not None) == kept
    assert model[0]._dense_weight is None
    said = capsys.readouterr().out
    assert said.count("\n") == (0 if kept else 1) and ("above the limit" in said) == (not kept)


def test_the_limit_lets_the_embedded_model_in_and_keeps_a_big_one_out(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        big = QuantizedLinear(
            65_000,
            1_000_000,
            bias=False,
            format="nf4",
            block_size=64,
            double_quant=True,
            double_quant_block_size=256,
            compute_dtype=torch.bfloat16,
            device="meta",
        )
    with cached_if_small(big):  # expanding it would fail: there is nothing on meta
        assert big._dense_weight is None
    assert "they would take 130.0 GB" in capsys.readouterr().out
