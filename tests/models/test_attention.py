"""Attention on the CPU: as transformers' own, closer to the exact result in bfloat16, and with less kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_lab.models import attention
from qlora_lab.models.attention import NAME, cpu_attention, use_fast_attention
from qlora_lab.ops.native.attention import NativeAttention
from qlora_lab.ops.native.load import Kernels
from qlora_lab.ops.registry import KERNELS
from tests.bfloat16 import bfloat16_units
from tests.tiny_models import LLAMA

ROWS, HEADS, KEY_HEADS, TOKENS, SIZE = 2, 4, 2, 37, 16
Forward = Callable[..., tuple[Tensor, None]]
needs_kernels = pytest.mark.skipif(KERNELS.library is None, reason=f"no native kernels: {KERNELS.reason}")


class Attention(nn.Module):
    """What the functions read from the module that calls them."""

    is_causal = True
    num_key_value_groups = HEADS // KEY_HEADS


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether bfloat16 is emulated on the machine of the test."""
    with bfloat16_units(not request.param):
        yield request.param


def problem(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value as a model lays them out, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(ROWS, tokens, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    inputs = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    return inputs, torch.randn(shapes[0], generator=generator).to(dtype)


def run(forward: Forward, inputs: list[Tensor], gradient: Tensor, **options: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output, _ = forward(Attention(), *leaves, **{"attention_mask": None, "scaling": 0.3, **options})
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


def right_padded() -> Tensor:
    """Return a causal mask for rows of which the second ends early."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(ROWS, 1, TOKENS, TOKENS).clone()
    mask[1, :, :, 30:] = False
    return mask


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "boolean": {"attention_mask": right_padded()},
    "bias": {"attention_mask": torch.where(right_padded(), 0.0, -1e9)},
    "everywhere": {"is_causal": False},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_float32_gives_what_transformers_gives(options: dict[str, Any]) -> None:
    inputs, gradient = problem(torch.float32)
    expected = run(sdpa_attention_forward, inputs, gradient, **options)
    for found, right in zip(run(cpu_attention, inputs, gradient, **options), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("options", [MASKS[name] for name in MASKS if name != "bias"])
def test_bfloat16_is_closer_to_the_exact_result_than_torchs(options: dict[str, Any]) -> None:
    inputs, gradient = problem(torch.bfloat16)
    exact = run(sdpa_attention_forward, [tensor.double() for tensor in inputs], gradient.double(), **options)
    theirs = run(sdpa_attention_forward, inputs, gradient, **options)
    ours = run(cpu_attention, inputs, gradient, **options)
    assert_closer(ours, theirs, exact)


def test_a_bias_meets_float32_where_bfloat16_is_emulated() -> None:
    inputs, gradient = problem(torch.bfloat16)
    bias = MASKS["bias"]["attention_mask"]
    exact = run(sdpa_attention_forward, [part.double() for part in inputs], gradient, attention_mask=bias.double())
    theirs = run(sdpa_attention_forward, inputs, gradient, attention_mask=bias.bfloat16())
    with bfloat16_units(False):
        ours = run(cpu_attention, inputs, gradient, attention_mask=bias.bfloat16())
    assert_closer(ours, theirs, exact)


def assert_closer(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    assert all(found.dtype == torch.bfloat16 for found in ours)
    errors = [
        [float((found - right).norm()) for found, right in zip(each, exact, strict=True)] for each in (ours, theirs)
    ]
    assert all(our < their for our, their in zip(*errors, strict=True))


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_kernels_it_is_transformers_own(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention, "KERNELS", Kernels(None, "none", "a test"))
    inputs, gradient = problem(dtype)
    mask = options.get("attention_mask")
    if mask is not None and mask.dtype != torch.bool:
        options = {"attention_mask": mask.to(dtype)}
    with bfloat16_units(True):
        ours = run(cpu_attention, inputs, gradient, **options)
    theirs = run(sdpa_attention_forward, inputs, gradient, **options)
    assert all(torch.equal(found, right) for found, right in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["position_bias", "dropout"])
def test_what_the_kernels_do_not_do_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(NativeAttention, "forward", None)
    inputs, gradient = problem(torch.float32)
    options: dict[str, Any] = {"dropout": 0.5, "position_bias": torch.zeros(1, HEADS, TOKENS, TOKENS)}
    found = []
    for forward in (cpu_attention, sdpa_attention_forward):
        torch.manual_seed(0)
        found.append(run(forward, inputs, gradient, **{name: options[name]}))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_one_token_after_others_as_in_generation(emulated: bool) -> None:
    (query, key, value), _ = problem(torch.bfloat16)
    expected, _ = sdpa_attention_forward(Attention(), query[:, :, -1:], key, value, None, scaling=0.3)
    actual, _ = cpu_attention(Attention(), query[:, :, -1:], key, value, None, scaling=0.3)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, right_padded()], ids=["causal", "boolean"])
def test_it_keeps_each_input_once(dtype: torch.dtype, mask: Tensor | None) -> None:
    inputs, _ = problem(dtype)
    storages: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: storages.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        cpu_attention(Attention(), *[tensor.requires_grad_() for tensor in inputs], mask, scaling=0.3)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    per_head = ROWS * TOKENS * SIZE * dtype.itemsize
    expected = (2 * HEADS + 2 * KEY_HEADS) * per_head + ROWS * HEADS * TOKENS * 4  # and logsumexp in float32
    assert kept == expected + (0 if mask is None else mask.nbytes)  # which all layers share


def test_a_model_gives_the_loss_and_gradients_it_gave() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.2))
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = []
    for implementation in ("sdpa", NAME):
        assert model.config._attn_implementation == implementation
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        model.set_attn_implementation(NAME)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [("sdpa", NAME), ("eager", "eager")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_get_it_instead_of_sdpa(dtype: torch.dtype, before: str, after: str) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        attn_implementation=before,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    use_fast_attention(model)
    assert model.config._attn_implementation == after
