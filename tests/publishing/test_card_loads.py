"""What a card tells to do does it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab.config.schema import QuantConfig
from qlora_lab.evaluation.run_model import open_run
from qlora_lab.export import main
from qlora_lab.models.load import load_model
from tests.evaluation.finished_runs import finished


def test_the_three_lines_of_a_card_load_the_adapter_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ("quant=none", "optim.learning_rate=0.05", "adapter.alpha=400")
    run = finished(tmp_path / "runs", *plain)
    main([run.run_id, "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    adapters = tmp_path / "out/adapters"
    config = run.config()
    base = load_model(
        config.model,
        QuantConfig(format="none", double_quant=False),
        compute_dtype=torch.float32,
        device="cpu",
        cache_dir=tmp_path,
        seed=config.seed,
    )
    base.save_pretrained(adapters / "tiny_random")
    found = re.search(r"```python\n(.*?)```", (adapters / run.run_id / "README.md").read_text(), re.DOTALL)
    assert found is not None and found[1].count("\n") == 3
    names: dict[str, Any] = {}
    monkeypatch.chdir(adapters)
    exec(found[1], names)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        loaded, bare = names["model"].eval()(ids).logits, base(ids).logits
        expected = open_run(run.path, cache_dir=tmp_path).model(ids).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)  # sums in another order
    assert (loaded - bare).abs().max() > 0.01, "the adapter does something"
