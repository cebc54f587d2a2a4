"""Gated MLPs that work their product out twice: the same numbers, fewer tensors kept, and where it does not apply."""

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_lab.adapters.gated_mlp import GATED_MLPS, GatedMlp, is_gated_mlp
from qlora_lab.adapters.lora import add_adapters
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.quant.linear import cached_weights
from qlora_lab.quant.quantizer import quantize_model
from qlora_lab.quant.settings import QloraLabConfig
from tests.adapters.conftest import randomize_adapters
from tests.tiny_models import WIDER_LLAMA

FAMILIES: list[tuple[Any, Any]] = [
    (LlamaConfig, LlamaForCausalLM),
    (Qwen3Config, Qwen3ForCausalLM),
    (Gemma2Config, Gemma2ForCausalLM),  # GELU
]
SIZE = WIDER_LLAMA | {"vocab_size": 96, "head_dim": 16}


def adapted(
    family: tuple[Any, Any] = FAMILIES[0], dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> PreTrainedModel:
    """Build a quantized model with adapters that have values, in training mode."""
    config, model = family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        built = model(config(**SIZE, initializer_range=0.2)).to(dtype)
    quantize_model(built, QloraLabConfig("nf4", 64, True, 256, dtype))
    add_adapters(built, AdapterConfig(rank=4, dropout=dropout), torch.Generator().manual_seed(0))
    randomize_adapters(built)
    return built.train()


def written_out(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose MLPs are those of transformers again."""
    plain = copy.deepcopy(model)
    names = [name for name, module in plain.named_modules() if isinstance(module, GatedMlp)]
    assert len(names) == SIZE["num_hidden_layers"]
    for name in names:
        mlp: Any = LlamaMLP(LlamaConfig(**SIZE))
        for part, module in plain.get_submodule(name).named_children():
            mlp.add_module(part, module)
        plain.set_submodule(name, mlp)
    return plain


def loss_and_gradients(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)  # of the dropout
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("family", "dtype", "dropout"),
    [
        (FAMILIES[0], torch.float32, 0.0),
        (FAMILIES[0], torch.bfloat16, 0.3),
        (FAMILIES[1], torch.float32, 0.3),
        (FAMILIES[2], torch.float32, 0.0),
    ],
    ids=["llama", "llama bfloat16 dropout", "qwen3 dropout", "gemma2"],
)
def test_loss_and_gradients_are_those_of_the_mlp_written_out(
    family: tuple[Any, Any], dtype: torch.dtype, dropout: float, checkpointing: bool, ids: Tensor
) -> None:
    model = adapted(family, dtype, dropout)
    plain = written_out(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = loss_and_gradients(model, ids)
    expected_loss, expected = loss_and_gradients(plain, ids)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name  # the same operations on the same numbers


def test_gate_and_up_are_all_it_keeps_of_the_width_of_the_mlp(ids: Tensor) -> None:
    def kept(model: PreTrainedModel) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.shape[-1:] == (SIZE["intermediate_size"],) and tensor.ndim == 3:
                storages[tensor.data_ptr()] = tensor  # alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return len(storages)

    model = adapted()
    assert (kept(model), kept(written_out(model))) == (2 * 2, 2 * 4)


def test_names_and_values_of_the_state_stay() -> None:
    model = adapted()
    plain = written_out(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not model.eval().model.layers[0].mlp.training


def test_evaluation_generation_and_expanded_weights_give_what_they_gave(ids: Tensor) -> None:
    model = adapted().eval()
    plain = written_out(model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    with cached_weights(model), cached_weights(plain):
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_hooks_on_its_parts_are_called(ids: Tensor) -> None:
    model = adapted()
    mlp = model.model.layers[0].mlp
    for part in (mlp.down_proj, mlp.down_proj.base, mlp.act_fn):
        seen: list[Tensor] = []
        handle = part.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        expected = loss_and_gradients(written_out(model), ids)[1]
        seen.clear()
        gradients = loss_and_gradients(model, ids)[1]
        handle.remove()
        # a quantized layer is never called by its adapter, so that its hooks have nothing to see
        assert len(seen) == (0 if part is mlp.down_proj.base else 1)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


def test_other_layers_in_the_place_of_down_proj_are_called(ids: Tensor) -> None:
    mlp = adapted().model.layers[0].mlp
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    dense = nn.Linear(96, 64)
    mlp.down_proj = dense
    assert torch.equal(mlp(x), dense(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


@pytest.mark.parametrize("path", sorted(GATED_MLPS))
def test_the_classes_of_transformers_compute_the_formula(path: str) -> None:
    module, _, name = path.rpartition(".")
    config = SimpleNamespace(**SIZE, hidden_act="silu", hidden_activation="gelu_pytorch_tanh", mlp_bias=False)
    torch.manual_seed(2)
    mlp = getattr(importlib.import_module(module), name)(config)
    assert is_gated_mlp(mlp)
    x = torch.randn(3, 64)
    for training in (False, True):
        mlp.train(training)
        assert torch.equal(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))
        assert torch.equal(mlp(x), GatedMlp(mlp)(x))


def test_mlps_of_another_formula_are_left_alone() -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)

    config = LlamaConfig(**SIZE)
    assert not is_gated_mlp(Doubled(config))
    patched, watched, learning = LlamaMLP(config), LlamaMLP(config), LlamaMLP(config)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    watched.register_forward_hook(lambda *_: None)
    learning.act_fn = nn.PReLU()
    for mlp in (patched, watched, learning):
        assert not is_gated_mlp(mlp)


def test_a_model_that_is_not_quantized_keeps_its_mlps(make_llama) -> None:
    model = make_llama()
    add_adapters(model, AdapterConfig(rank=4), torch.Generator())
    assert not any(isinstance(module, GatedMlp) for module in model.modules())
