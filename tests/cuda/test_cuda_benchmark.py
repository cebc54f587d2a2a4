"""What the benchmark of the CUDA kernels compares does the same work, here on tiny weights on a CPU."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lab.ops.adamw.optimizer import ReferenceKernels
from tests.cuda.scripts import load_script

OUT, IN = 96, 128


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    script = load_script("cuda_ops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "DEVICE", torch.device("cpu"))
        patch.setattr(script, "PAST_CACHE_BYTES", 0)  # then there are two copies
        yield script


@pytest.fixture(scope="module")
def weights(script: ModuleType) -> Any:
    torch.manual_seed(0)
    return script.Weights(OUT, IN)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def results(cell: Any, copy: int) -> dict[str, Any]:
    return {name: work(copy) for name, work in cell.work.items()}


def test_a_weight_is_quantized_and_expanded_by_both(script: ModuleType, weights: Any) -> None:
    quantize, dequantize = script.weight_cells("tiny", weights)
    assert (quantize.copies, dequantize.copies) == (2, 2)
    assert quantize.bytes == OUT * IN * (2 + 0.5 + 4 / 64)
    for copy in range(2):
        found = results(quantize, copy)
        if "bitsandbytes" in found:
            assert torch.equal(found["ours"][0], found["bitsandbytes"][0].flatten())
        # on CPUs bitsandbytes expands into no given tensor
        assert relative_error(dequantize.work["ours"](copy), weights.dense_of(copy)) < 0.15


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_products_are_of_one_x_and_one_weight(script: ModuleType, weights: Any, rows: int) -> None:
    cell = script.product_cell("tiny", weights, rows)
    for copy in range(2):
        found = results(cell, copy)
        assert all(each.shape == (rows, OUT) for each in found.values())
        assert relative_error(found["ours"], found["torch dense"]) < 0.2
        if "bitsandbytes" in found:
            assert relative_error(found["ours"], found["bitsandbytes"]) < 2e-2


def test_a_training_step_of_one_layer_gives_the_same_gradients(script: ModuleType, weights: Any) -> None:
    cell = script.training_cell("tiny", weights, rows=40, rank=4)
    found = results(cell, 0)
    wide = found["ours with a float32 adapter"]
    assert [gradient.dtype for gradient in found["ours"]] == [torch.bfloat16] * 3
    assert [gradient.dtype for gradient in wide] == [torch.bfloat16, torch.float32, torch.float32]
    theirs = found.get("PEFT's way with bitsandbytes", wide)
    for gradient, other in zip(found["ours"], theirs, strict=True):
        assert relative_error(gradient, other) < 2e-2
    assert found["torch dense without adapter"][0].shape == found["ours"][0].shape


def test_with_dropout_everybody_drops_as_much(script: ModuleType, weights: Any) -> None:
    cell = script.training_cell("tiny", weights, rows=40, rank=4, dropout=0.5)
    assert cell.name == "tiny forward+backward 40 rows, adapter with dropout 0.5"
    plain = results(script.training_cell("tiny", weights, rows=40, rank=4), 0)
    found = results(cell, 0)
    # another sum of as many terms, half of them doubled and half gone; not that of everything
    norms = {name: float(gradients[1].float().norm()) for name, gradients in found.items() if "dense" not in name}
    assert all(0.75 < norm / norms["ours"] < 1.33 for norm in norms.values())
    assert norms["ours"] > 1.15 * float(plain["ours"][1].float().norm())
    assert relative_error(found["ours"][1], found["ours with a float32 adapter"][1]) < 2e-2  # of one seed
    assert relative_error(script.training_cell("tiny", weights, 40, 4, 0.5).work["ours"](1)[1], found["ours"][1]) > 0.5


def test_the_cells_of_each_shape_have_one_with_dropout(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SHAPES", ((OUT, IN),))
    monkeypatch.setattr(script, "CUDA_KERNELS", type("", (), {"library": object(), "streams": object()})())
    monkeypatch.setattr(script, "adamw_cells", lambda kernels: ())
    names = [cell.name for cell in script.cells("forward+backward")]
    adapter = f"{OUT}x{IN} forward+backward 4096 rows, adapter"
    assert names == [adapter, f"{adapter} with dropout 0.1"]


def test_all_tensors_of_a_step_are_updated(script: ModuleType) -> None:
    torch.manual_seed(0)
    for cell in script.adamw_cells(ReferenceKernels(), width=8, wider=300, layers=2):
        assert cell.name.endswith("28 tensors")
        assert cell.bytes == 2 * 16 * (11 * 8 + 3 * 300) * (28 if "32 bits" in cell.name else 16)
        for work in cell.work.values():
            work(0)


def test_figures_are_medians_beside_the_rate_of_a_copy(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed:
        def __init__(self, work: Any, copies: int, recorded: bool = True) -> None:
            self.work = work

        def seconds(self) -> float:
            return float(self.work(0))

    monkeypatch.setattr(script, "Timed", Timed)
    cell = script.Cell("a cell", 2, 8e9, {"ours": lambda copy: 4e-3, "theirs": lambda copy: 6e-3})
    assert script.measure(cell, rounds=3, copy_rate=4e12) == {
        "cell": "a cell",
        "us": {"ours": 4000.0, "theirs": 6000.0},
        "ratio": {"theirs": 1.5},
        "GBps": 2000.0,
        "share_of_copy": 0.5,
    }


def test_without_kernels_for_a_gpu_there_is_nothing_to_measure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script.CUDA_KERNELS.library is not None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["cuda_ops.py"])
    with pytest.raises(SystemExit, match="there is nothing to measure: reference"):
        script.main()
