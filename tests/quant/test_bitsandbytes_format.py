"""Weights as bitsandbytes lays them out: its own tensors decode here, ours decode there, and damage is named."""

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from qlora_lab.errors import ModelError
from qlora_lab.ops.blockwise.op import dequantize_weight, quantize_absmax, quantize_blockwise
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.formats import FORMATS
from qlora_lab.quant.bitsandbytes_format import QUANT_TYPES, from_tensors, settings_of, to_tensors

STATE = "weight.quant_state.bitsandbytes__nf4"
shared = pytest.mark.parametrize("fmt", QUANT_TYPES)
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
block_sizes = pytest.mark.parametrize("block_size", [32, 64, 128])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(fmt: str, nested: bool, block_size: int = 64, shape: tuple[int, int] = (40, 256)) -> PackedWeight:
    packed, absmax = quantize_blockwise(normal(*shape), fmt, block_size)
    parts = quantize_absmax(absmax) if nested else (absmax, None, None)
    return PackedWeight(packed, *parts, fmt, block_size, 256, *shape)


def theirs(fmt: str, nested: bool, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return what bitsandbytes writes for a weight, and what it expands it to in float32."""
    packed, state = bnb.quantize_4bit(
        normal(40, 256), quant_type=QUANT_TYPES[fmt], compress_statistics=nested, **options
    )
    written = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {"weight": packed, **written}, bnb.dequantize_4bit(packed, state)


@shared
@nested_or_not
@block_sizes
def test_what_bitsandbytes_wrote_expands_to_the_same_bits(fmt: str, nested: bool, block_size: int) -> None:
    tensors, expected = theirs(fmt, nested, blocksize=block_size)
    weight = from_tensors(tensors)
    assert (weight.format, weight.block_size, weight.nested_absmax is not None) == (fmt, block_size, nested)
    assert torch.equal(dequantize_weight(weight), expected)


@shared
@nested_or_not
@block_sizes
def test_what_we_write_expands_to_the_same_bits_in_bitsandbytes(fmt: str, nested: bool, block_size: int) -> None:
    weight = ours(fmt, nested, block_size)
    tensors = to_tensors(weight, torch.float32)
    packed = tensors.pop("weight")
    state = QuantState.from_dict({name.removeprefix("weight."): part for name, part in tensors.items()}, "cpu")
    assert torch.equal(bnb.dequantize_4bit(packed, state), dequantize_weight(weight))


@nested_or_not
def test_both_write_the_same_tensors_of_a_weight(nested: bool) -> None:
    tensors, _ = theirs("nf4", nested, blocksize=64)
    written = to_tensors(ours("nf4", nested), torch.float32)
    states = [json.loads(bytes(one.pop(STATE).tolist())) for one in (tensors, written)]
    assert states[0] == states[1]
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_codes_stored_as_another_dtype_are_the_same_bytes(storage: torch.dtype) -> None:
    tensors, expected = theirs("nf4", nested=True, blocksize=64, quant_storage=storage)
    assert tensors["weight"].dtype == storage
    assert torch.equal(dequantize_weight(from_tensors(tensors)), expected)


@pytest.mark.parametrize("fmt", FORMATS)
@nested_or_not
def test_every_format_comes_back_as_it_was(fmt: str, nested: bool) -> None:
    weight = ours(fmt, nested, shape=(7, 65))  # an odd number of codes, in blocks across rows
    back = from_tensors(to_tensors(weight, torch.bfloat16))
    assert back[4:] == weight[4:]
    for part, expected in zip(back[:4], weight[:4], strict=True):
        assert (part is None) == (expected is None)
        assert expected is None or (part.dtype == expected.dtype and torch.equal(part, expected))


def edit_state(tensors: dict[str, Tensor], **changes: Any) -> None:
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def flip(tensor: Tensor, index: int) -> None:
    tensor[index] = tensor[index] ^ 0x80


def cast(tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> None:
    tensors[name] = tensors[name].to(dtype)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no absmax": (lambda t: t.pop("weight.absmax"), r"weight\.absmax is missing"),
    "no codes": (lambda t: t.pop("weight"), "weight is missing"),
    "no nested absmax": (lambda t: t.pop("weight.nested_absmax"), r"weight\.nested_absmax is missing"),
    "no state": (lambda t: t.pop(STATE), r"needs one weight\.quant_state"),
    "two states": (lambda t: t.update({STATE[:-3] + "fp4": t[STATE]}), r"needs one weight\.quant_state"),
    "cut codes": (lambda t: t.update(weight=t["weight"][:-5]), "take 5120 bytes .* but packed is 5115"),
    "cut absmax": (lambda t: t.update({"weight.absmax": t["weight.absmax"][1:]}), "160 blocks of 64, but absmax has"),
    "cut nested": (
        lambda t: t.update({"weight.nested_absmax": t["weight.nested_absmax"][1:]}),
        "160 absmax codes make 1 blocks of 256",
    ),
    "absmax cast": (lambda t: cast(t, "weight.absmax", torch.bfloat16), r"absmax must be uint8; got bfloat16"),
    "nested cast": (lambda t: cast(t, "weight.nested_absmax", torch.float16), "nested_absmax must be float32"),
    "codes cast": (lambda t: cast(t, "weight", torch.float32), "but packed is 20480"),
    "not a number": (lambda t: t["weight.nested_absmax"].fill_(torch.nan), "NaN or infinite"),
    "another map": (lambda t: t["weight.quant_map"].mul_(0.9), "quant_map is not the table"),
    "block size": (lambda t: edit_state(t, blocksize=48), "block_size must be a power of two from 32 to 4096; got 48"),
    "nested block size": (lambda t: edit_state(t, nested_blocksize=0), "nested_block_size must be a power of two"),
    "another block size": (lambda t: edit_state(t, blocksize=128), "80 blocks of 128, but absmax has 160"),
    "another type": (lambda t: edit_state(t, quant_type="fp4"), "quant_type is 'fp4' in weight.quant_state"),
    "no block size": (lambda t: edit_state(t, blocksize=None), "quant_state must hold blocksize"),
    "a shape of one": (lambda t: edit_state(t, shape=[10240]), "shape in quant_state must be"),
    "a negative shape": (lambda t: edit_state(t, shape=[-40, -256]), "shape in quant_state must be"),
    "offset": (lambda t: edit_state(t, nested_offset=float("nan")), "nested_offset in quant_state is not finite"),
    "flipped JSON": (lambda t: flip(t[STATE], 3), "quant_state is no JSON"),
    "flipped brace": (lambda t: flip(t[STATE], 0), "quant_state is no JSON"),
    "a list": (lambda t: t.update({STATE: torch.tensor([91, 93], dtype=torch.uint8)}), "must hold quant_type; got"),
    "JSON cast": (lambda t: cast(t, STATE, torch.float32), "must be JSON as uint8; got float32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_sentence(damage: str) -> None:
    tensors, _ = theirs("nf4", nested=True, blocksize=64)
    spoil, message = DAMAGE[damage]
    spoil(tensors)
    with pytest.raises(ModelError, match=message) as refusal:
        from_tensors(tensors)
    assert "\n" not in str(refusal.value)


def test_absmax_that_was_not_quantized_again_must_be_float32() -> None:
    tensors, _ = theirs("nf4", nested=False, blocksize=64)
    cast(tensors, "weight.absmax", torch.float16)
    with pytest.raises(ModelError, match="absmax must be float32; got float16"):
        from_tensors(tensors)


def test_settings_of_a_configuration() -> None:
    four_bit = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert settings_of(four_bit) == {"format": "fp4_e2m1", "double_quant": False}
    nf4 = four_bit | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert settings_of(nf4) == {"format": "nf4", "double_quant": True}
    assert settings_of({"quant_method": "bitsandbytes", "load_in_8bit": True}) is None
    assert settings_of({"quant_method": "awq", "bits": 4}) is None
