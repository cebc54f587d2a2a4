"""LoRA layers: what they compute, what they train, and how many parameters a placement costs."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_lab.adapters.lora import (
    LoraLinear,
    LoraSettings,
    adapted_layers,
    add_adapters,
    count_parameters,
    scaling_of,
    train_everything,
    trainable_parameters,
)
from qlora_lab.adapters.placement import target_modules
from qlora_lab.config.architecture import adapter_parameters, linear_layers
from qlora_lab.config.placement import match_linears
from qlora_lab.config.schema import AdapterConfig, ArchitectureConfig
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.models.architecture import to_transformers
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.quant.quantizer import quantize_model
from qlora_lab.quant.settings import QloraLabConfig

SMOLLM2_135M = ArchitectureConfig("llama", 576, 30, 9, 3, 1536, 49152, tie_embeddings=True, max_position=8192)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_with_values(*, dropout: float = 0.0, scaling: float = 0.5) -> LoraLinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        base = nn.Linear(24, 40)
    layer = LoraLinear(base, LoraSettings(3, scaling, dropout), generator())
    with torch.no_grad():
        layer.lora_B.normal_(generator=generator(2))
    return layer


def test_forward_is_the_formula() -> None:
    layer = layer_with_values()
    x = torch.randn(2, 5, 24, generator=generator(4))
    merged = layer.base.weight + 0.5 * layer.lora_B @ layer.lora_A
    expected = x @ merged.T + layer.base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # another order of float32 sums


def test_gradients_reach_the_adapter_and_the_input_but_not_the_base() -> None:
    layer = layer_with_values().double()  # gradcheck needs double
    layer.base.requires_grad_(False)
    x = torch.randn(4, 24, generator=generator(4), dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": lora_a, "lora_B": lora_b}, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.lora_A, layer.lora_B))
    layer(x).sum().backward()
    assert layer.base.weight.grad is None


def test_computes_in_the_dtype_of_the_input_and_trains_in_float32() -> None:
    layer = layer_with_values()
    layer.base.to(torch.bfloat16)
    x = torch.randn(4, 24, generator=generator(4)).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_A.grad.dtype == torch.float32
    exact = copy.deepcopy(layer).float()(x.float())
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_adapters_compute_with_their_values_and_get_bfloat16_gradients(
    make_llama, ids: Tensor, compute_dtype: torch.dtype
) -> None:
    """On packed layers, gated ones among them, and on dense ones: as float32 adapters of the same values."""
    results = {}
    for dtype in ("bfloat16", "float32"):
        model = quantize_model(make_llama(), QloraLabConfig("nf4", skip_modules=["q_proj", "lm_head"]))
        model.to(compute_dtype)
        add_adapters(model, AdapterConfig(rank=4, dtype=dtype), generator(5))
        with torch.no_grad():
            for number, parameter in enumerate(trainable_parameters(model).values()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(number)).bfloat16() * 0.25)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results[dtype] = loss, {name: p.grad for name, p in trainable_parameters(model).items()}
    (loss, gradients), (exact, exact_gradients) = results["bfloat16"], results["float32"]
    assert torch.equal(loss, exact)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, exact_gradients[name].bfloat16())


def test_dropout_drops_inputs_of_the_adapter_only_while_training() -> None:
    layer = layer_with_values(dropout=0.5)
    x = torch.ones(1, 24)
    assert torch.equal(layer.eval()(x), layer_with_values()(x))
    layer.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = torch.stack([layer(x) for _ in range(4000)])
    adapter = outputs - layer.base(x)
    assert adapter.std(dim=0).min() > 0
    expected = layer.eval()(x) - layer.base(x)
    # inputs that stay are scaled up, so the mean is kept: 4,000 draws put it within 5 standard errors
    assert ((adapter.mean(dim=0) - expected).abs() < 5 * adapter.std(dim=0) / math.sqrt(4000)).all()


def test_scaling() -> None:
    assert scaling_of(16, 8.0, False) == 0.5
    assert scaling_of(16, 8.0, True) == 2.0


def test_a_fresh_adapter_changes_nothing(make_llama, ids: Tensor) -> None:
    plain, adapted = make_llama(), make_llama()
    add_adapters(adapted, AdapterConfig(rank=4), generator())
    assert torch.equal(plain(ids).logits, adapted(ids).logits)


def test_initial_values_are_those_of_peft_and_come_from_the_generator_alone(make_llama) -> None:
    torch.manual_seed(1)
    first = make_llama()
    names = add_adapters(first, AdapterConfig(rank=4), generator(9))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = make_llama()
    add_adapters(second, AdapterConfig(rank=4), generator(9))
    assert torch.equal(torch.get_rng_state(), state)

    drawing = generator(9)
    for name in names:
        layer = first.get_submodule(name)
        expected = torch.empty(4, layer.in_features)
        nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=drawing)  # what PEFT calls
        torch.testing.assert_close(layer.lora_A.data, expected)
        assert torch.equal(layer.lora_A, second.get_submodule(name).lora_A)
        assert not layer.lora_B.any()


def test_only_adapters_are_trained(make_llama) -> None:
    model = make_llama()
    names = add_adapters(model, AdapterConfig(rank=4, placement="query_value"), generator())
    assert names == [f"model.layers.{layer}.self_attn.{x}_proj" for layer in (0, 1) for x in "qv"]
    assert list(trainable_parameters(model)) == [f"{name}.lora_{x}" for name in names for x in "AB"]
    assert list(adapted_layers(model)) == names
    assert not model.training
    with pytest.raises(ModelError, match="has adapters already"):
        add_adapters(model, AdapterConfig(rank=4), generator())


def test_adapters_sit_on_quantized_layers(make_llama, ids: Tensor) -> None:
    model = quantize_model(make_llama(), QloraLabConfig("nf4"))
    before = model(ids).logits
    names = add_adapters(model, AdapterConfig(rank=4), generator())
    assert len(names) == 14
    assert isinstance(model.get_submodule(names[0]).base, QuantizedLinear)
    torch.testing.assert_close(model(ids).logits, before)  # native kernels round the MLP's product elsewhere than torch
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    model(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradients[f"{name}.lora_B"].any() for name in names)


def test_the_output_head_is_no_target_whatever_it_is_called(make_llama) -> None:
    model = make_llama()
    model.config.tie_word_embeddings = False
    model.vocabulary = nn.Linear(64, 96)
    model.get_output_embeddings = lambda: model.vocabulary
    with pytest.raises(ConfigError, match=r"adapter\.target_regex"):
        target_modules(model, AdapterConfig(placement="regex", target_regex="vocabulary|lm_head"))


def test_everything_is_trained_in_float32(make_llama) -> None:
    model = make_llama().to(torch.bfloat16)
    model.requires_grad_(False)
    train_everything(model)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    trained, total = count_parameters(model)
    # embedding 96 x 64 (tied, so once), two layers of q, o (64 x 64), k, v (32 x 64), three of 96 x 64,
    # two norms of 64 each, and the last norm
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64
    assert trained == total == 96 * 64 + 2 * layer + 64
    with pytest.raises(ModelError, match="quantized"):
        train_everything(quantize_model(make_llama(), QloraLabConfig("nf4")))


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_packed_weights_count_as_weights(make_llama, fmt: str) -> None:
    plain, quantized = make_llama(), quantize_model(make_llama(), QloraLabConfig(fmt))
    _, total = count_parameters(plain)
    assert count_parameters(quantized)[1] == total
    add_adapters(quantized, AdapterConfig(rank=4, placement="query_value"), generator())
    # q: 4 x (64 + 64), v: 4 x (64 + 32), in each of two layers
    assert count_parameters(quantized) == (2 * (512 + 384), total + 2 * (512 + 384))


# Worked out by hand for SmolLM2-135M at rank 8: a layer costs 8 x (in + out).
#   q, o: 8 x (576 + 576) = 9,216 each; k, v: 8 x (576 + 192) = 6,144 each   -> attention 30,720 in a layer
#   gate, up: 8 x (576 + 1,536) = 16,896 each; down: 8 x (1,536 + 576) = 16,896 -> feed-forward 50,688 in a layer
# and there are 30 layers.
COUNTS = [
    ("all_linear", None, None, 2_442_240),  # 30 x 81,408; also the published number
    ("attention", None, None, 921_600),  # 30 x 30,720
    ("feed_forward", None, None, 1_520_640),  # 30 x 50,688
    ("query_value", None, None, 460_800),  # 30 x (9,216 + 6,144)
    ("regex", r".*\.(k_proj|down_proj)", None, 691_200),  # 30 x (6,144 + 16,896)
    ("all_linear", None, 8, 651_264),  # 8 x 81,408
    ("attention", None, 1, 30_720),
]


@pytest.mark.parametrize(("placement", "regex", "last_k", "expected"), COUNTS)
def test_trainable_parameters_of_smollm2(
    placement: str, regex: str | None, last_k: int | None, expected: int, empty_smollm2: nn.Module
) -> None:
    model = copy.deepcopy(empty_smollm2)
    config = AdapterConfig(rank=8, placement=placement, target_regex=regex, last_k_layers=last_k)
    add_adapters(model, config, generator())
    assert count_parameters(model) == (expected, 134_515_008 + expected)

    layers = {layer[0]: layer for layer in linear_layers(SMOLLM2_135M) or []}
    matched = match_linears(list(layers), placement, regex, last_k)
    assert adapter_parameters([layers[name] for name in matched], rank=8) == expected


@pytest.fixture(scope="module")
def empty_smollm2() -> nn.Module:
    """The model's shapes without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(to_transformers(SMOLLM2_135M))
