"""Attention on the CPU: as transformers' own, closer to the exact result in bfloat16, and with less kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_lab.config.hardware import SHORT_ROW_TOKENS
from qlora_lab.models.attention import NAME, cpu_attention, use_fast_attention
from tests.bfloat16 import bfloat16_units
from tests.tiny_models import LLAMA

ROWS, HEADS, KEY_HEADS, TOKENS, SIZE = 2, 4, 2, 37, 16
Forward = Callable[..., tuple[Tensor, None]]


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


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_bfloat16_is_closer_to_the_exact_result_than_torchs(emulated: bool, options: dict[str, Any]) -> None:
    inputs, gradient = problem(torch.bfloat16)
    mask = options.get("attention_mask")
    floating = mask is not None and mask.dtype != torch.bool
    given = {**options, "attention_mask": mask.bfloat16()} if floating else options
    wide = {**options, "attention_mask": mask.double()} if floating else options
    exact = run(sdpa_attention_forward, [tensor.double() for tensor in inputs], gradient.double(), **wide)
    theirs = run(sdpa_attention_forward, inputs, gradient, **given)
    ours = run(cpu_attention, inputs, gradient, **given)
    assert all(found.dtype == torch.bfloat16 for found in ours)
    errors = [
        [float((found - right).norm()) for found, right in zip(each, exact, strict=True)] for each in (ours, theirs)
    ]
    assert all(our < their for our, their in zip(*errors, strict=True))


def test_long_rows_are_left_to_units_for_bfloat16() -> None:
    inputs, gradient = problem(torch.bfloat16, SHORT_ROW_TOKENS)
    with bfloat16_units(True):
        ours = run(cpu_attention, inputs, gradient)
    theirs = run(sdpa_attention_forward, inputs, gradient)
    assert all(torch.equal(found, right) for found, right in zip(ours, theirs, strict=True))


def test_one_token_after_others_as_in_generation(emulated: bool) -> None:
    (query, key, value), _ = problem(torch.bfloat16)
    expected, _ = sdpa_attention_forward(Attention(), query[:, :, -1:], key, value, None, scaling=0.3)
    actual, _ = cpu_attention(Attention(), query[:, :, -1:], key, value, None, scaling=0.3)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_it_keeps_each_input_once_in_bfloat16(emulated: bool) -> None:
    inputs, _ = problem(torch.bfloat16)
    storages: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: storages.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        cpu_attention(Attention(), *[tensor.requires_grad_() for tensor in inputs], None, scaling=0.3)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    per_head = ROWS * TOKENS * SIZE * 2
    assert kept == (2 * HEADS + 2 * KEY_HEADS) * per_head + ROWS * HEADS * TOKENS * 4  # and logsumexp in float32


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


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [(torch.bfloat16, "sdpa", NAME), (torch.float32, "sdpa", "sdpa"), (torch.bfloat16, "eager", "eager")],
    ids=["bfloat16", "float32", "its own"],
)
def test_only_models_in_bfloat16_get_it(emulated: bool, dtype: torch.dtype, before: str, after: str) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        attn_implementation=before,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    use_fast_attention(model, dtype)
    assert model.config._attn_implementation == after
