"""A base model kept for the next run: the same tensors, and nothing of the run before."""

import torch

from qlora_lab.adapters.lora import add_adapters
from qlora_lab.config.schema import RunConfig
from qlora_lab.models.warm import WarmBase, base_key
from qlora_lab.run import DTYPES, load_model
from tests.helpers import composed


def load(config: RunConfig) -> object:
    return load_model(
        config.model,
        config.quant,
        compute_dtype=DTYPES["float32"],
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
