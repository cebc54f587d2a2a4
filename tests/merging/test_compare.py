"""What is said of two sets of logits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_lab.data.tokenization import Example
from qlora_lab.merging import compare as compare_module
from qlora_lab.merging.compare import Comparison, compare, tolerance_of

LABELS = torch.tensor([1, 4, 2])
BASE, CHANGE, NOISE = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0)).unbind()


def compared(monkeypatch: pytest.MonkeyPatch, *logits: torch.Tensor) -> Comparison:
    """Compare three models that give these logits for three targets."""
    monkeypatch.setattr(compare_module, "target_logits", lambda model, batch: (model.logits, LABELS))
    models: Any = [
        SimpleNamespace(logits=one, device=torch.device("cpu"), get_memory_footprint=lambda: 7) for one in logits
    ]
    return compare(models, [Example([5, 1, 4, 2], 1, 1, "", None, 3)], pad_id=0)


def test_what_is_added_to_every_logit_of_a_target_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    with_adapter = BASE + CHANGE
    found = compared(monkeypatch, BASE, with_adapter, with_adapter + torch.tensor([[3.0], [-2.0], [9.0]]))
    assert found.max_difference < 1e-5 and found.relative_difference < 1e-6
    assert found.perplexity_after == pytest.approx(found.perplexity_before) != pytest.approx(found.perplexity_base)
    assert found.change_kept == pytest.approx(1) and found.top1_agreement == 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.5])
def test_the_share_of_the_change_that_is_kept(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Noise across the change does not count towards it."""
    change, noise = (one - one.mean(1, keepdim=True) for one in (CHANGE, NOISE))
    noise -= change * (noise * change).sum() / change.square().sum()
    found = compared(monkeypatch, BASE, BASE + change, BASE + share * change + noise)
    assert found.change_kept == pytest.approx(share, abs=1e-5)
    assert f"{share:.1%} of the adapter's change is kept" in str(found)


def test_an_adapter_that_changes_nothing_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, BASE, BASE, BASE)
    assert "adapter's change" not in str(found) and found.to_dict()["change_kept"] is None


def test_the_coarser_dtype_decides_how_much_may_differ() -> None:
    assert tolerance_of("dequantized", ("float32", "float32")) < tolerance_of("dequantized", ("bfloat16", "float32"))
    assert tolerance_of("dequantized", ("bfloat16", "float32")) == tolerance_of("dequantized", ("float32", "bfloat16"))
    assert tolerance_of("quantized", ("float32", "float32")) == 0.5
