"""What a call costs before it computes: python kernels/bench/cpu_calls.py [--json FILE] [--only TEXT].

Every op, and the functions around them with their checks, on one weight of 1x64 and one row. See rounds.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from checks import BYTES_EQUAL, Expected
from rounds import Cell, main

from qlora_lab.ops.blockwise import op as blockwise
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.lora import op as lora

Work = Callable[[], Any]


def calls() -> dict[str, dict[str, Work]]:
    """Return by name of the call what each implementation does for it."""
    dense, x, gradient = torch.ones(1, 64), torch.ones(1, 64), torch.ones(1, 1)
    packed, absmax = blockwise.quantize_blockwise(dense, "nf4", 64)
    codes, nested_absmax, offset = blockwise.quantize_absmax(absmax)
    weight = PackedWeight(packed, absmax, None, None, "nf4", 64, 256, 1, 64)
    nested = weight._replace(absmax=codes, nested_absmax=nested_absmax, offset=offset)
    A, B, out, low = torch.ones(4, 64), torch.ones(1, 4), torch.empty(1, 64), torch.ones(1, 4)
    trained = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    bnb_packed, state = bnb.quantize_4bit(dense, quant_type="nf4", blocksize=64)
    ops = torch.ops.qlora_lab
    adapter = (A, B, 1.0, 0.0, 0)

    def others(x: torch.Tensor) -> dict[str, Work]:
        return {
            "bitsandbytes": lambda: matmul_4bit(x, bnb_packed.t(), state),
            "torch dense": lambda: F.linear(x, dense),
        }

    ours: dict[str, Work] = {
        "op quantize_blockwise": lambda: ops.quantize_blockwise.default(dense, "nf4", 64),
        "op dequantize_weight": lambda: ops.dequantize_weight.default(*weight, torch.float32),
        "op dequantize_weight_into": lambda: ops.dequantize_weight_into.default(*weight, out),
        "op quantize_absmax": lambda: ops.quantize_absmax.default(absmax, offset, 256),
        "op dequantize_absmax": lambda: ops.dequantize_absmax.default(codes, nested_absmax, offset, 256),
        "op quantized_linear_kernel": lambda: blockwise.QUANTIZED_LINEAR(x, *weight, None),
        "op quantized_linear_grad_input_kernel": lambda: blockwise.QUANTIZED_LINEAR_GRAD_INPUT(gradient, *weight),
        "op lora_linear_kernel": lambda: lora.LORA_LINEAR(x, *weight, None, *adapter),
        "op lora_linear_backward": lambda: lora.LORA_LINEAR_BACKWARD(gradient, x, low, *weight, *adapter, True),
        "op quantized_linear": lambda: ops.quantized_linear.default(x, *weight, None),
        "function quantized_linear": lambda: blockwise.quantized_linear(x, weight),
        "function quantized_linear, double quantization": lambda: blockwise.quantized_linear(x, nested),
        "function quantized_linear, graph kept": lambda: blockwise.quantized_linear(trained[0], weight),
        "function lora_linear": lambda: lora.lora_linear(x, weight, None, A, B, scaling=1.0),
        "function lora_linear, graph kept": lambda: lora.lora_linear(
            trained[0], weight, None, *trained[1:], scaling=1.0
        ),
    }
    beside = {
        "function quantized_linear": others(x),
        "function quantized_linear, graph kept": others(trained[0]),
    }
    return {name: {"ours": work, **beside.get(name, {})} for name, work in ours.items()}


def cells(wanted: str) -> Iterator[Cell]:
    """Yield the cells whose name contains `wanted`; those with others beside them return a sum of 64 ones."""
    for name, work in calls().items():
        if wanted in name:
            total = Expected(lambda: torch.full((1, 1), 64.0), dict.fromkeys(work, BYTES_EQUAL))
            yield Cell(name, work, expected=total if len(work) > 1 else None)


if __name__ == "__main__":
    main(__doc__, cells)
