"""Quantized weights as bitsandbytes lays them out in a checkpoint.

A linear layer of bitsandbytes' 4-bit checkpoints is these tensors, NAME being its path:

    NAME.weight                    (bytes, 1) uint8, or the same bytes as another dtype; the codes
    NAME.weight.absmax             (blocks,) float32; uint8 codes of it with double quantization
    NAME.weight.quant_map          (16,) float32: the value of each code
    NAME.weight.quant_state.bitsandbytes__nf4   uint8, JSON: quant_type, blocksize, dtype, shape
    with double quantization also
    NAME.weight.nested_absmax      (nested blocks,) float32
    NAME.weight.nested_quant_map   (256,) float32: the value of each absmax code
    in the JSON                    nested_blocksize, nested_dtype, nested_offset

Codes, their order in a byte, blocks and both levels of absmax are those of `ops.blockwise`, so nothing is converted.
Formats that bitsandbytes does not have are written alike, with `quant_state.qlora_lab__FORMAT` for the last key, FORMAT
for quant_type, and 256 values in the quant_map of an 8-bit format.

Source: bitsandbytes 0.50.2, functional.py, QuantState.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_lab.errors import ModelError, QloraLabError
from qlora_lab.ops.blockwise.checks import dtype_name
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.formats import FORMATS, dynamic_map_levels

METHOD = "bitsandbytes"  # quant_method in a config.json
QUANT_TYPES = {"nf4": "nf4", "fp4_e2m1": "fp4"}  # the formats that bitsandbytes has, by its names
FORMAT_OF_KEY = {
    f"weight.quant_state.{f'bitsandbytes__{QUANT_TYPES[name]}' if name in QUANT_TYPES else f'qlora_lab__{name}'}": name
    for name in FORMATS
}
TENSOR_PARTS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
PARTS = ("weight", *TENSOR_PARTS, *FORMAT_OF_KEY)  # every name below a layer's path
NESTED_BLOCK_SIZE = 256  # of bitsandbytes; without double quantization it stands for nothing


def to_tensors(weight: PackedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that hold `weight` in a checkpoint, by their names below the layer's path.

    Args:
        dtype: the one that bitsandbytes expands the weight to.
    """
    fmt = FORMATS[weight.format]
    quant_type = QUANT_TYPES.get(weight.format, weight.format)
    state: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": weight.block_size,
        "dtype": dtype_name(dtype),
        "shape": [weight.out_features, weight.in_features],
    }
    tensors = {
        "weight": weight.packed.view(-1, 1),
        "weight.absmax": weight.absmax,
        "weight.quant_map": torch.tensor(fmt.values_by_code(), dtype=torch.float32),
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        state |= {"nested_blocksize": weight.nested_block_size, "nested_dtype": "float32"}
        state["nested_offset"] = weight.offset.item()
        tensors["weight.nested_absmax"] = weight.nested_absmax
        tensors["weight.nested_quant_map"] = torch.tensor(dynamic_map_levels(signed=True), dtype=torch.float32)
    (key,) = (key for key, name in FORMAT_OF_KEY.items() if name == weight.format)
    tensors[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Return the weight that the tensors of one layer hold, sharing their memory.

    Args:
        tensors: by their names below the layer's path, as `to_tensors` returns them.

    Raises:
        ModelError: a part is missing, damaged, or does not belong to the others.
    """
    states = [key for key in FORMAT_OF_KEY if key in tensors]
    if len(states) != 1:
        found = ", ".join(sorted(tensors))
        raise ModelError(f"a quantized weight needs one weight.quant_state; the checkpoint has {found}")
    fmt = FORMAT_OF_KEY[states[0]]
    state = _read_state(tensors[states[0]])
    if state["quant_type"] != QUANT_TYPES.get(fmt, fmt):
        raise ModelError(f"quant_type is {state['quant_type']!r} in {states[0]}; is the checkpoint damaged?")
    nested = "nested_blocksize" in state
    _check_parts(tensors, nested, FORMATS[fmt].values_by_code())
    offset = None
    if nested:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=tensors["weight"].device)
    weight = PackedWeight(
        tensors["weight"].contiguous().view(-1).view(torch.uint8),
        tensors["weight.absmax"].contiguous(),
        tensors["weight.nested_absmax"].contiguous() if nested else None,
        offset,
        fmt,
        state["blocksize"],
        state["nested_blocksize"] if nested else NESTED_BLOCK_SIZE,
        *state["shape"],
    )
    try:
        weight.check()
    except QloraLabError as error:
        raise ModelError(str(error)) from error
    scales = weight.absmax if weight.nested_absmax is None else weight.nested_absmax
    if not (scales.isfinite().all() and (offset is None or offset.isfinite())):
        raise ModelError("absmax holds NaN or infinite values; is the checkpoint damaged?")
    return weight


def _read_state(packed: Tensor) -> dict[str, Any]:
    """Return the JSON of a quant_state, with every value of the type it must have."""
    if packed.dtype != torch.uint8:
        raise ModelError(f"quant_state must be JSON as uint8; got {dtype_name(packed.dtype)}")
    try:
        state = json.loads(bytes(packed.flatten().tolist()))
    except ValueError as error:
        raise ModelError(f"quant_state is no JSON ({error}); is the checkpoint damaged?") from error
    wanted: dict[str, tuple[type, ...]] = {"quant_type": (str,), "blocksize": (int,), "shape": (list,)}
    if isinstance(state, dict) and any(key.startswith("nested_") for key in state):
        wanted |= {"nested_blocksize": (int,), "nested_offset": (int, float)}
    for key, types in wanted.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), types):
            raise ModelError(f"quant_state must hold {key}; got {json.dumps(state)[:200]}; is the checkpoint damaged?")
    shape = state["shape"]
    if len(shape) != 2 or not all(isinstance(size, int) and 0 < size < 2**31 for size in shape):
        raise ModelError(f"the shape in quant_state must be [out_features, in_features]; got {shape}")
    if not math.isfinite(state.get("nested_offset", 0.0)):
        raise ModelError("nested_offset in quant_state is not finite; is the checkpoint damaged?")
    return state


def _check_parts(tensors: Mapping[str, Tensor], nested: bool, values_by_code: tuple[float, ...]) -> None:
    """Raise ModelError unless every part is there, in its dtype, and the maps are those of our kernels."""
    dtypes = {"weight.absmax": torch.uint8 if nested else torch.float32, "weight.quant_map": torch.float32}
    maps = {"weight.quant_map": values_by_code}
    if nested:
        dtypes |= {"weight.nested_absmax": torch.float32, "weight.nested_quant_map": torch.float32}
        maps["weight.nested_quant_map"] = dynamic_map_levels(signed=True)
    missing = [name for name in ("weight", *dtypes) if name not in tensors]
    if missing:
        raise ModelError(f"{missing[0]} is missing; is the checkpoint complete?")
    for name, dtype in dtypes.items():
        if tensors[name].dtype != dtype:
            found = dtype_name(tensors[name].dtype)
            raise ModelError(
                f"{name} must be {dtype_name(dtype)}; got {found}; was the model cast before it was saved?"
            )
    for name, values in maps.items():
        expected = torch.tensor(values, dtype=torch.float32)
        found_map = tensors[name].flatten().cpu()
        if found_map.shape != expected.shape or not torch.allclose(found_map, expected, rtol=1e-6, atol=1e-9):
            raise ModelError(f"{name} is not the table of its data type, and no other can be decoded")


def settings_of(quantization_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what bitsandbytes' part of a config.json says of `QuantConfig`; None if it is not of a 4-bit model."""
    if quantization_config.get("quant_method", METHOD) != METHOD or not quantization_config.get("load_in_4bit"):
        return None
    format_of = {theirs: ours for ours, theirs in QUANT_TYPES.items()}
    quant_type = quantization_config.get("bnb_4bit_quant_type", "fp4")
    return {
        "format": format_of.get(quant_type, quant_type),
        "double_quant": bool(quantization_config.get("bnb_4bit_use_double_quant", False)),
    }
