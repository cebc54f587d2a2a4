"""Weights go to their device as they are read and are quantized there: the host never holds more than one of them."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import core_model_loading

from qlora_lab.models import load
from qlora_lab.models.load import load_model
from qlora_lab.quant import linear
from qlora_lab.quant.linear import QuantizedLinear
from tests.models.loading import NF4, of_folder
from tests.models.test_damaged_weights import sharded

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=GPU)])
def test_the_host_holds_one_weight_at_a_time(
    device: str, kind: str, make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has no numbers to check, all of it but the numbers is as on a GPU."""
    folder = sharded(make_folder(), torch.float16, kind)
    on_host: list[weakref.ref[Tensor]] = []
    quantized_on: list[str] = []
    materialize, quantize = core_model_loading._materialize_copy, linear.quantize_blockwise

    def watched(tensor: Any, to: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        assert str(to).partition(":")[0] == device
        assert all(earlier() is None for earlier in on_host), "the host still holds an earlier weight"
        read = tensor[...]
        if not isinstance(tensor, Tensor):  # a .bin gives tensors that are there already, mapped from the file
            on_host.append(weakref.ref(read))
        return materialize(read, to, dtype)

    def noted(weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        quantized_on.append(weight.device.type)
        return quantize(weight, *arguments)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    monkeypatch.setattr(linear, "quantize_blockwise", noted)
    if device == "meta":
        monkeypatch.setattr(linear, "check_magnitudes", lambda *_: None)
        monkeypatch.setattr(load, "check_values", lambda *_: None)
    model = load_model(of_folder(folder), NF4, compute_dtype=torch.float32, device=device, cache_dir=tmp_path, seed=0)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert quantized_on == [device] * len(layers) and len(layers) == 14
    assert {tensor.device.type for layer in layers for tensor in layer.buffers()} == {device}
    assert {tensor.device.type for tensor in model.parameters()} == {device}
    assert kind == "bin" or len(on_host) > len(layers)
