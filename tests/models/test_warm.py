"""A base model kept for the next run: the same tensors, and nothing of the run before."""

import weakref

import pytest
import torch

from qlora_lab.adapters.lora import add_adapters
from qlora_lab.config.schema import RunConfig
from qlora_lab.models.load import load_model
from qlora_lab.models.warm import WarmBase, base_key
from tests.helpers import composed


def load(config: RunConfig) -> object:
    return load_model(
        config.model,
        config.quant,
        compute_dtype=torch.float32,
        device="cpu",
        cache_dir=None,  # type: ignore[arg-type]  # random weights lie nowhere
        seed=config.seed,
    )


def test_a_run_leaves_no_trace_in_the_base() -> None:
    config = composed("model=tiny_random", "quant=nf4")
    warm = WarmBase()
    first = warm.model("key", lambda: load(config))  # type: ignore[arg-type, return-value]
    names = [name for name, _ in first.named_modules()]
    weights = {name: tensor.data_ptr() for name, tensor in first.state_dict().items()}
    add_adapters(first, config.adapter, torch.Generator().manual_seed(0))
    first.train()
    second = warm.model("key", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert [name for name, _ in second.named_modules()] == names and not second.training
    assert {name: tensor.data_ptr() for name, tensor in second.state_dict().items()} == weights
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(second(tokens).logits, load(config)(tokens).logits)  # type: ignore[operator]


def test_another_base_is_loaded_anew() -> None:
    one, other = composed("model=tiny_random"), composed("model=tiny_random", "seed=1")
    assert base_key(one) != base_key(other), "random weights depend on the seed"
    assert base_key(one) == base_key(composed("model=tiny_random", "optim.learning_rate=1e-3", "adapter.rank=4"))
    assert base_key(one) != base_key(composed("model=tiny_random", "quant=none"))
    loaded: list[str] = []
    warm = WarmBase()
    for key in ("a", "a", "b", "a"):
        warm.model(key, lambda key=key: loaded.append(key) or torch.nn.Linear(1, 1))  # type: ignore[misc, return-value]
    assert loaded == ["a", "b", "a"]


@pytest.mark.parametrize(
    "overrides",
    [["adapter=none", "quant=none"], ["adapter.trained_modules=[embed_tokens]"], ["model.new_tokens=['<x>']"]],
)
def test_a_run_that_changes_its_base_gets_its_own_alone_in_memory(overrides: list[str]) -> None:
    warm = WarmBase()
    kept = weakref.ref(warm.model("key", lambda: torch.nn.Linear(1, 1))._parameters["weight"])  # type: ignore[arg-type, return-value]
    assert kept() is not None

    def load() -> torch.nn.Module:
        assert kept() is None, "both might not fit"
        return torch.nn.Linear(1, 1)

    key = base_key(composed("model=tiny_random", *overrides))
    assert key is None
    assert warm.model(key, load) is not warm.model(key, load)  # type: ignore[arg-type]
