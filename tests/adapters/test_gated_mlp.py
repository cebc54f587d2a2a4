"""Gated MLPs that work their product out twice: the same numbers, fewer tensors kept, and where it does not apply."""

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_lab.adapters.gated_mlp import GATED_MLPS, GatedMlp, _is_silu, is_gated_mlp
from qlora_lab.adapters.lora import add_adapters
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.ops.lora import gated
from qlora_lab.ops.registry import KERNELS
from qlora_lab.quant.linear import QuantizedLinear, cached_weights
from qlora_lab.quant.quantizer import quantize_model
from qlora_lab.quant.settings import QloraLabConfig
from tests.adapters.conftest import randomize_adapters
from tests.tiny_models import WIDER_LLAMA

FAMILIES: list[tuple[Any, Any]] = [
    (LlamaConfig, LlamaForCausalLM),
    (Qwen3Config, Qwen3ForCausalLM),
    (Gemma2Config, Gemma2ForCausalLM),  # GELU
]
# How far a gradient may be off, of its norm: a few units where native kernels round elsewhere than torch, in one layer
# and, grown by what follows, in a model of two.
OFF_IN_LAYER = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
OFF_IN_MODEL = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
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


@pytest.fixture
def is_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether SiLU's product is one of native kernels; without, torch works it out as for all else."""
    if request.param and KERNELS.library is None:
        pytest.skip(f"no native kernels: {KERNELS.reason}")
    if not request.param:
        monkeypatch.setattr(gated, "KERNELS", SimpleNamespace(library=None))
    return bool(request.param)


natively = pytest.mark.parametrize("is_native", [False, True], indirect=True, ids=["torch", "native"])
by_torch = pytest.mark.parametrize("is_native", [False], indirect=True, ids=["torch"])


def assert_near(actual: Tensor, expected: Tensor, share: float) -> None:
    assert (actual.double() - expected.double()).norm() <= share * expected.double().norm()


@natively
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
    family: tuple[Any, Any], dtype: torch.dtype, dropout: float, checkpointing: bool, is_native: bool, ids: Tensor
) -> None:
    model = adapted(family, dtype, dropout)
    plain = written_out(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = loss_and_gradients(model, ids)
    expected_loss, expected = loss_and_gradients(plain, ids)
    assert gradients.keys() == expected.keys() and len(gradients) == 28
    if is_native and family is not FAMILIES[2]:
        assert not all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())  # they ran
        assert_near(loss, expected_loss, OFF_IN_MODEL[dtype])
        for name, gradient in gradients.items():
            assert_near(gradient, expected[name], OFF_IN_MODEL[dtype])
        return
    assert torch.equal(loss, expected_loss)
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


@by_torch
def test_hooks_on_its_parts_are_called(is_native: bool, ids: Tensor) -> None:
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


def outputs_and_gradients(
    gate: Tensor, up: Tensor, compute_dtype: torch.dtype, activation: Any = F.silu, dropout: float = 0.0
) -> list[Tensor]:
    """Return what gated_lora_linear gives, and the gradients of gate, up, lora_A and lora_B."""
    draw = torch.Generator().manual_seed(5)
    linear = nn.Linear(96, 40, bias=False)
    linear.weight.data.normal_(generator=draw)
    weight = QuantizedLinear.from_linear(
        linear, format="nf4", block_size=64, double_quant=False, double_quant_block_size=256, compute_dtype=gate.dtype
    ).packed_weight
    leaves = [gate, up, torch.randn(4, 96, generator=draw), torch.randn(40, 4, generator=draw)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = gated.gated_lora_linear(
        activation,
        *leaves[:2],
        weight,
        None,
        *leaves[2:],
        compute_dtype=compute_dtype,
        scaling=0.5,
        dropout=dropout,
        seed=3,
    )
    out.backward(torch.randn(out.shape, generator=draw).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def draw_gate_and_up(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gate, up = torch.randn(2, 5, 3, 96, generator=torch.Generator().manual_seed(4)).to(dtype)
    return gate, up


def turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_native", [True], indirect=True, ids=["native"])
def test_kernels_give_what_torch_gives(
    dtype: torch.dtype, compute_dtype: torch.dtype, autocast: bool, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up = draw_gate_and_up(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = outputs_and_gradients(gate, up, compute_dtype, dropout=0.2)
        in_other_order = outputs_and_gradients(turned(gate), turned(up), compute_dtype, dropout=0.2)
        monkeypatch.setattr(gated, "KERNELS", SimpleNamespace(library=None))
        expected = outputs_and_gradients(gate, up, compute_dtype, dropout=0.2)
    rounded = torch.bfloat16 if torch.bfloat16 in (dtype, compute_dtype) else torch.float32
    for one, turned_one, other in zip(found, in_other_order, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert_near(one, other, OFF_IN_LAYER[rounded])
        assert torch.equal(one, turned_one)
    assert not torch.equal(found[1], expected[1])  # it is the kernels that ran


@pytest.mark.parametrize(
    ("activation", "of_up"),
    [
        (F.gelu, lambda up: up),
        (nn.SiLU(), lambda up: up),  # a module may be anything: GatedMlp says which are SiLU
        (F.silu, lambda up: up.bfloat16()),
        (F.silu, lambda up: up.double()),
    ],
    ids=["gelu", "module", "two dtypes", "float64"],
)
def test_what_kernels_do_not_take_is_bit_for_bit_that_of_torch(
    activation: Any, of_up: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up = draw_gate_and_up()
    up = of_up(up)
    found = outputs_and_gradients(gate, up, torch.float32, activation)
    monkeypatch.setattr(gated, "KERNELS", SimpleNamespace(library=None))
    for one, other in zip(found, outputs_and_gradients(gate, up, torch.float32, activation), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)], ids=str)
@natively
def test_gradients_that_nobody_wants(wants: tuple[bool, bool], is_native: bool) -> None:
    gate, up = (t.requires_grad_(wanted) for t, wanted in zip(draw_gate_and_up(), wants, strict=True))
    product = gated._ProductAgain(F.silu, gate, up, wants[0])
    assert (product._native is not None) == is_native
    gradients = product.gradients(torch.ones_like(gate) if any(wants) else torch.empty(0), wants[1])
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    (F.silu(leaves[0]) * leaves[1]).sum().backward()
    for found, leaf, wanted in zip(gradients, leaves, wants, strict=True):
        if wanted:
            torch.testing.assert_close(found, leaf.grad)


def test_the_silu_of_every_family_is_known() -> None:
    for config, is_silu in ((LlamaConfig, True), (Qwen3Config, True), (Gemma2Config, False)):
        size = config(**SIZE)
        name = getattr(size, "hidden_activation", None) or size.hidden_act
        assert _is_silu(ACT2FN[name]) == is_silu
    assert _is_silu(nn.SiLU()) and not _is_silu(nn.GELU())
    patched = nn.SiLU()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert not _is_silu(patched)

    class Other(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    assert not _is_silu(Other())


def test_a_compiled_model_trains_as_one_that_is_not(ids: Tensor) -> None:
    model = adapted()
    expected, gradients = loss_and_gradients(model, ids)
    torch._dynamo.reset()
    loss, compiled = loss_and_gradients(torch.compile(model, backend="aot_eager"), ids)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert_near(compiled[f"_orig_mod.{name}"], gradient, 1e-4)
