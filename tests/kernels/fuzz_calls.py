"""The calls of fuzz.py: for every C entry, random arguments and what would spoil them."""

import ctypes
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.native.library import AdamwView, AdapterView, AttentionView, WeightView

OK, BAD_FORMAT, BAD_BLOCK_SIZE, BAD_DTYPE, BAD_SIZE, NULL_POINTER, NO_MEMORY, BAD_ISA = range(8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = tuple(32 << i for i in range(8))
BAD_BLOCK_SIZES = (-64, 0, 1, 16, 48, 8192, 2**40)
TOO_LARGE = (-1, -(2**63), 2**60, 2**63 - 1)
STRANGE = (math.nan, math.inf, -math.inf, 1e-41, -1e-45, 3e38)
PATTERN = 0xA5
MOST_SHIFT = 17  # elements by which a buffer is off the alignment of its allocation


class Case:
    """The buffers and choices of one call."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**62))
        self.finite = self.random.random() < 0.7
        self._before: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def place(self, values: Tensor) -> Tensor:
        """Return a copy at the end of an allocation of its own."""
        size = values.element_size()
        shift = self.random.randrange(MOST_SHIFT + 1) * size
        whole = torch.full((shift + values.numel() * size,), PATTERN, dtype=torch.uint8)
        self._before.append(whole[:shift])
        inside = whole[shift:].view(values.dtype)
        inside.copy_(values.flatten())
        return inside

    def values(self, count: int, dtype: torch.dtype = torch.float32, *, positive: bool = False) -> Tensor:
        numbers = torch.randn(count, generator=self.generator)
        numbers = numbers.abs() if positive else numbers
        if not self.finite:
            for _ in range(min(count, 3)):
                numbers[self.random.randrange(count)] = self.random.choice(STRANGE)
        return self.place(numbers.to(dtype))

    def codes(self, count: int) -> Tensor:
        return self.place(torch.randint(256, (count,), generator=self.generator).to(torch.uint8))

    def output(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        blank = math.nan if dtype.is_floating_point else PATTERN
        self._outputs.append(self.place(torch.full((count,), blank, dtype=dtype)))
        return self._outputs[-1]

    def check(self, refused: bool) -> None:
        """Fail if anything before a buffer was written, an output was not, or a refused call wrote one."""
        assert all((before == PATTERN).all() for before in self._before), "written before a buffer"
        for output in self._outputs:
            blank = output.isnan() if output.is_floating_point() else output == PATTERN
            if refused:
                assert blank.all(), "a refused call wrote its output"
            elif self.finite and output.is_floating_point():
                assert not blank.any(), "not all of an output was written"

    def count(self, most: int) -> int:
        """Return a size: often small, sometimes 0, up to `most`."""
        kind = self.random.random()
        if kind < 0.04:
            return 0
        return self.random.randint(1, most if kind < 0.3 else max(2, most // 8))

    def threads(self) -> int:
        return self.random.choice((-1, 0, 1, 2, 3, 4, 2**31 - 1))

    def weight(self, out_features: int, in_features: int) -> tuple[WeightView, list[Tensor]]:
        """Return a random weight, nested or not, and what its view points to."""
        fmt = self.random.choice(list(FORMATS))
        numel, block_size, nested_block_size = out_features * in_features, *self.random.choices(BLOCK_SIZES, k=2)
        blocks = -(-numel // block_size)
        nested = self.random.random() < 0.5
        parts = [self.codes(FORMATS[fmt].packed_bytes(numel))]
        if nested:
            scales = self.values(-(-blocks // nested_block_size), positive=True)
            parts += [self.codes(blocks), scales, self.values(1)]
        else:
            parts.append(self.values(blocks, positive=True))
        pointers = [part.data_ptr() for part in parts] + [None] * (4 - len(parts))
        numbers = (out_features, in_features, block_size, nested_block_size, list(FORMATS).index(fmt))
        return WeightView(*pointers, *numbers), parts


Arguments = dict[str, Any]
# What spoils a call: (argument, or STRUCT.field), bad values, the status it must give.
Spoilers = list[tuple[str, tuple[Any, ...], int]]
Built = tuple[Arguments, Spoilers]
BAD_DTYPES = (-1, 3, 99)
WEIGHT_SPOILERS: Spoilers = [
    ("weight", (None,), NULL_POINTER),
    ("weight.packed", (None,), NULL_POINTER),
    ("weight.absmax", (None,), NULL_POINTER),
    ("weight.format", (-1, len(FORMATS), 2**31 - 1), BAD_FORMAT),
    ("weight.block_size", BAD_BLOCK_SIZES, BAD_BLOCK_SIZE),
    ("weight.in_features", TOO_LARGE, BAD_SIZE),
    ("weight.out_features", TOO_LARGE, BAD_SIZE),
]


def nulls(*names: str) -> Spoilers:
    return [(name, (None,), NULL_POINTER) for name in names]


def quantize(case: Case) -> Built:
    numel, block_size = case.count(40_000), case.random.choice(BLOCK_SIZES)
    dtype, fmt = case.random.randrange(3), case.random.choice(list(FORMATS))
    arguments = {
        "weight": case.values(numel, DTYPES[dtype]),
        "dtype": dtype,
        "numel": numel,
        "format": list(FORMATS).index(fmt),
        "block_size": block_size,
        "packed": case.output(FORMATS[fmt].packed_bytes(numel), torch.uint8),
        "absmax": case.output(-(-numel // block_size)),
    }
    return arguments, [
        *nulls("weight", "packed", "absmax"),
        ("dtype", BAD_DTYPES, BAD_DTYPE),
        ("format", (-1, len(FORMATS), 2**31 - 1), BAD_FORMAT),
        ("block_size", BAD_BLOCK_SIZES, BAD_BLOCK_SIZE),
        ("numel", TOO_LARGE, BAD_SIZE),
    ]


def dequantize(case: Case) -> Built:
    out_features, in_features, dtype = case.count(300), case.count(300), case.random.randrange(2)
    weight, parts = case.weight(out_features, in_features)
    out = case.output(out_features * in_features, DTYPES[dtype])
    arguments = {"weight": weight, "dtype": dtype, "out": out, "parts": parts}
    return arguments, [*WEIGHT_SPOILERS, *nulls("out"), ("dtype", (2, *BAD_DTYPES), BAD_DTYPE)]


def quantize_absmax(case: Case) -> Built:
    blocks, block_size = case.count(9000), case.random.choice(BLOCK_SIZES)
    arguments = {
        "absmax": case.values(blocks, positive=True),
        "blocks": blocks,
        "block_size": block_size,
        "offset": 0.8,
        "codes": case.output(blocks, torch.uint8),
        "nested_absmax": case.output(-(-blocks // block_size)),
    }
    spoilers = [("block_size", BAD_BLOCK_SIZES, BAD_BLOCK_SIZE), ("blocks", TOO_LARGE, BAD_SIZE)]
    return arguments, [*nulls("absmax", "codes", "nested_absmax"), *spoilers]


def dequantize_absmax(case: Case) -> Built:
    blocks, block_size = case.count(9000), case.random.choice(BLOCK_SIZES)
    arguments = {
        "codes": case.codes(blocks),
        "nested_absmax": case.values(-(-blocks // block_size), positive=True),
        "offset": case.values(1),
        "blocks": blocks,
        "block_size": block_size,
        "absmax": case.output(blocks),
    }
    spoilers = [("block_size", BAD_BLOCK_SIZES, BAD_BLOCK_SIZE), ("blocks", TOO_LARGE, BAD_SIZE)]
    return arguments, [*nulls("codes", "nested_absmax", "offset", "absmax"), *spoilers]


def product(case: Case) -> tuple[int, int, int, int, WeightView, list[Tensor]]:
    """Return rows, out_features, in_features, the number of a dtype, and a weight."""
    rows = case.count(1200) if case.random.random() < 0.05 else case.count(80)
    out_features, in_features = case.count(200), case.count(700)
    return rows, out_features, in_features, case.random.randrange(2), *case.weight(out_features, in_features)


PRODUCT_SPOILERS: Spoilers = [*WEIGHT_SPOILERS, ("dtype", (2, *BAD_DTYPES), BAD_DTYPE), ("rows", TOO_LARGE, BAD_SIZE)]


def linear(case: Case) -> Built:
    return one_product(case, "x")


def linear_grad_input(case: Case) -> Built:
    return one_product(case, "grad_output")


def one_product(case: Case, left: str) -> Built:
    """Return a product with the weight, or where `left` is grad_output with its transpose."""
    rows, out_features, in_features, dtype, weight, parts = product(case)
    forward = left == "x"
    read, written = (in_features, out_features) if forward else (out_features, in_features)
    arguments = {left: case.values(rows * read, DTYPES[dtype]), "dtype": dtype, "rows": rows, "weight": weight}
    if forward:
        arguments["bias"] = case.values(out_features, DTYPES[dtype]) if case.random.random() < 0.5 else None
    arguments |= {"out": case.output(rows * written, DTYPES[dtype]), "parts": parts}
    return arguments, [*PRODUCT_SPOILERS, *nulls(left, "out")]


def dense_linear(case: Case) -> Built:
    return dense_product(case, "x")


def dense_grad_input(case: Case) -> Built:
    return dense_product(case, "grad_output")


def dense_product(case: Case, left: str) -> Built:
    rows = case.count(1200) if case.random.random() < 0.05 else case.count(80)
    out_features, in_features = case.count(4000 if case.random.random() < 0.05 else 200), case.count(700)
    forward, dtype = left == "x", case.random.randrange(2)
    read, written = (in_features, out_features) if forward else (out_features, in_features)
    arguments = {
        left: case.values(rows * read, DTYPES[dtype] if forward else torch.float32),
        "rows": rows,
        "weight": case.values(out_features * in_features, DTYPES[dtype]),
        "dtype": dtype,
        "out_features": out_features,
        "in_features": in_features,
    }
    if forward:
        arguments["bias"] = case.values(out_features, DTYPES[dtype]) if case.random.random() < 0.5 else None
    arguments["out"] = case.output(rows * written)
    sizes: Spoilers = [(name, TOO_LARGE, BAD_SIZE) for name in ("rows", "out_features", "in_features")]
    return arguments, [*nulls(left, "weight", "out"), ("dtype", (2, *BAD_DTYPES), BAD_DTYPE), *sizes]


def attention(case: Case) -> Built:
    view, parts, spoilers = attention_inputs(case)
    of_heads = view.rows * view.tokens * view.heads
    arguments = {"attention": view, "out": case.output(of_heads * view.head_size, DTYPES[view.dtype])}
    arguments |= {"logsumexp": case.output(of_heads), "parts": parts}
    return arguments, [*spoilers, *nulls("out", "logsumexp")]


def attention_backward(case: Case) -> Built:
    view, parts, spoilers = attention_inputs(case)
    of_heads, of_keys = (view.rows * view.tokens * heads for heads in (view.heads, view.key_heads))
    dtype, size = DTYPES[view.dtype], view.head_size
    arguments = {
        "attention": view,
        "out": case.values(of_heads * size, dtype),
        "logsumexp": case.values(of_heads),
        "grad_out": case.values(of_heads * size, dtype),
        "grad_query": case.output(of_heads * size, dtype),
        "grad_key": case.output(of_keys * size, dtype),
        "grad_value": case.output(of_keys * size, dtype),
        "parts": parts,
    }
    pointers = ("out", "logsumexp", "grad_out", "grad_query", "grad_key", "grad_value")
    return arguments, [*spoilers, *nulls(*pointers)]


def attention_inputs(case: Case) -> tuple[AttentionView, list[Tensor], Spoilers]:
    """Return query, key, value and perhaps a mask, with the heads of a token beside each other or its tokens."""
    rows, key_heads, group = case.count(3), case.random.randint(1, 3), case.random.randint(1, 3)
    tokens = case.count(1200) if case.random.random() < 0.03 else case.count(150)
    size, dtype = case.random.randint(1, 100), case.random.randrange(2)
    heads = (key_heads * group, key_heads, key_heads)
    parts = [case.values(rows * tokens * of * size, DTYPES[dtype]) for of in heads]
    view = AttentionView(*(part.data_ptr() for part in parts))
    for name, of in zip(("query", "key", "value"), heads, strict=True):
        by_token = case.random.random() < 0.5
        within = (size, of * size) if by_token else (tokens * size, size)
        getattr(view, f"{name}_strides")[:] = (tokens * of * size, *within)
    if case.random.random() < 0.5:
        shared = case.random.random() < 0.5
        seen = torch.rand((1 if shared else rows) * tokens * tokens, generator=case.generator) < 0.7
        parts.append(case.place(seen.to(torch.uint8)))
        view.mask, view.mask_strides[:] = parts[-1].data_ptr(), (0 if shared else tokens * tokens, tokens)
    view.rows, view.heads, view.key_heads, view.tokens, view.head_size = rows, heads[0], key_heads, tokens, size
    view.scale, view.causal, view.dtype = size**-0.5, case.random.randrange(2), dtype
    spoilers: Spoilers = nulls("attention", "attention.query", "attention.key", "attention.value")
    spoilers.append(("attention.dtype", (2, *BAD_DTYPES), BAD_DTYPE))
    for name in ("rows", "heads", "key_heads", "tokens", "head_size"):
        spoilers.append((f"attention.{name}", TOO_LARGE, BAD_SIZE))
    return view, parts, [*spoilers, ("attention.key_heads", (0, heads[0] + 1), BAD_SIZE)]


def rms_norm(case: Case) -> Built:
    arguments, spoilers = norm_inputs(case)
    rows, columns = arguments["rows"], arguments["columns"]
    arguments |= {
        "eps": 1e-5,
        "out": case.output(rows * columns, DTYPES[arguments["dtype"]]),
        "scales": case.output(rows),
    }
    return arguments, [*spoilers, *nulls("out", "scales")]


def rms_norm_backward(case: Case) -> Built:
    arguments, spoilers = norm_inputs(case)
    rows, columns, dtype = arguments["rows"], arguments["columns"], DTYPES[arguments["dtype"]]
    arguments = {"grad_out": case.values(rows * columns, dtype), **arguments}
    arguments |= {"scales": case.values(rows, positive=True), "grad_x": case.output(rows * columns, dtype)}
    return arguments, [*spoilers, *nulls("grad_out", "scales", "grad_x")]


def norm_inputs(case: Case) -> Built:
    rows, columns, dtype = case.count(200), max(case.count(900), 1), case.random.randrange(2)
    arguments = {
        "x": case.values(rows * columns, DTYPES[dtype]),
        "dtype": dtype,
        "rows": rows,
        "columns": columns,
        "weight": case.values(columns, DTYPES[dtype]),
    }
    sizes: Spoilers = [("rows", TOO_LARGE, BAD_SIZE), ("columns", (0, *TOO_LARGE), BAD_SIZE)]
    return arguments, [*nulls("x", "weight"), ("dtype", (2, *BAD_DTYPES), BAD_DTYPE), *sizes]


def silu_gate(case: Case) -> Built:
    arguments, spoilers = gate_inputs(case)
    return arguments | {"out": case.output(arguments["numel"], DTYPES[arguments["dtype"]])}, [*spoilers, *nulls("out")]


def silu_gate_backward(case: Case) -> Built:
    """Return a backward pass, at times with a gradient in the place of the one that comes in."""
    arguments, spoilers = gate_inputs(case)
    numel, dtype = arguments["numel"], DTYPES[arguments["dtype"]]
    arguments = {"grad_out": case.values(numel, dtype), **arguments}
    in_place = case.random.choice((None, "grad_gate", "grad_up"))
    for name in ("grad_gate", "grad_up"):
        arguments[name] = arguments["grad_out"] if name == in_place else case.output(numel, dtype)
    return arguments, [*spoilers, *nulls("grad_out", "grad_gate", "grad_up")]


def gate_inputs(case: Case) -> Built:
    numel, dtype = case.count(40_000), case.random.randrange(2)
    arguments = {
        "gate": case.values(numel, DTYPES[dtype]),
        "up": case.values(numel, DTYPES[dtype]),
        "dtype": dtype,
        "numel": numel,
    }
    return arguments, [*nulls("gate", "up"), ("dtype", (2, *BAD_DTYPES), BAD_DTYPE), ("numel", TOO_LARGE, BAD_SIZE)]


def adapter(case: Case, out_features: int, in_features: int) -> tuple[AdapterView, list[Tensor]]:
    rank = case.count(100)
    matrices = [case.values(rank * in_features), case.values(out_features * rank)]
    dropout = case.random.choice((0.0, 0.1, 0.5))
    seed = case.random.randrange(2**64)
    return AdapterView(*(matrix.data_ptr() for matrix in matrices), rank, 0.7, dropout, seed), matrices


ADAPTER_SPOILERS: Spoilers = [
    *nulls("adapter", "adapter.lora_A", "adapter.lora_B"),
    ("adapter.rank", TOO_LARGE, BAD_SIZE),
    ("adapter.dropout", (1.0, -0.1, math.nan, math.inf), BAD_SIZE),
]


def lora_linear(case: Case) -> Built:
    arguments, spoilers = linear(case)
    weight, rows = arguments["weight"], arguments["rows"]
    view, matrices = adapter(case, weight.out_features, weight.in_features)
    arguments |= {"adapter": view, "low": case.output(rows * view.rank), "matrices": matrices}
    order = ("x", "dtype", "rows", "weight", "bias", "adapter", "low", "out", "parts", "matrices")
    return {name: arguments[name] for name in order}, [*spoilers, *ADAPTER_SPOILERS, *nulls("low")]


def lora_linear_backward(case: Case) -> Built:
    rows, out_features, in_features, dtype, weight, parts = product(case)
    view, matrices = adapter(case, out_features, in_features)
    wanted = case.random.random() < 0.7
    arguments = {
        "grad_output": case.values(rows * out_features, DTYPES[dtype]),
        "x": case.values(rows * in_features, DTYPES[dtype]),
        "low": case.values(rows * view.rank),
        "dtype": dtype,
        "rows": rows,
        "weight": weight,
        "adapter": view,
        "grad_input": case.output(rows * in_features, DTYPES[dtype]) if wanted else None,
        "grad_A": case.output(view.rank * in_features),
        "grad_B": case.output(out_features * view.rank),
        "parts": parts,
        "matrices": matrices,
    }
    pointers = nulls("grad_output", "x", "low", "grad_A", "grad_B")
    return arguments, [*PRODUCT_SPOILERS, *ADAPTER_SPOILERS, *pointers]


def adamw_tensors(case: Case, block_size: int) -> tuple[Any, list[Tensor]]:
    lengths = [case.count(9000) for _ in range(case.random.randint(1, 4))]
    views, kept = (AdamwView * len(lengths))(), []
    for index, numel in enumerate(lengths):
        dtype = case.random.choice((0, 1))
        tensors = [case.values(numel, DTYPES[dtype]), case.values(numel, DTYPES[dtype])]
        if case.random.random() < 0.5:
            tensors += [case.values(numel), case.values(numel, positive=True)]
        else:
            blocks = -(-numel // block_size)
            tensors += [case.codes(numel), case.codes(numel)]
            tensors += [case.values(blocks, positive=True), case.values(blocks, positive=True)]
        pointers = [tensor.data_ptr() for tensor in tensors] + [None] * (6 - len(tensors))
        views[index] = AdamwView(*pointers, numel, 0.01, dtype)
        kept += tensors
    return views, kept


TENSOR_SPOILERS: Spoilers = [
    *nulls("tensors", "tensors.gradient"),
    ("tensors.numel", TOO_LARGE, BAD_SIZE),
    ("tensors.dtype", (2, 3, -1), BAD_DTYPE),
    ("count", (-1, -(2**63)), BAD_SIZE),
]


def gradient_norm(case: Case) -> Built:
    views, kept = adamw_tensors(case, 256)
    norm, first = ctypes.c_double(math.nan), ctypes.c_int64(-2)
    arguments = {"tensors": views, "count": len(views), "scale": 0.5, "norm": norm, "first": first, "kept": kept}
    return arguments, [*TENSOR_SPOILERS, *nulls("norm", "first")]


def adamw(case: Case) -> Built:
    block_size = case.random.choice(BLOCK_SIZES)
    views, kept = adamw_tensors(case, block_size)
    numbers = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "gradient_scale": 0.5}
    step = {"step": case.random.choice((1, 2, 1000, 2**40)), "block_size": block_size}
    arguments = {"tensors": views, "count": len(views), **numbers, **step, "kept": kept}
    spoilers = [*TENSOR_SPOILERS, *nulls("tensors.parameter", "tensors.exp_avg", "tensors.exp_avg_sq")]
    spoilers.append(("step", (0, -1, -(2**63)), BAD_SIZE))
    if any(view.exp_avg_absmax for view in views):  # in 8 bits
        spoilers.append(("block_size", BAD_BLOCK_SIZES, BAD_BLOCK_SIZE))
    return arguments, spoilers


ENTRIES: dict[str, Callable[[Case], Built]] = {
    f"qlk_cpu_{build.__name__}": build
    for build in (
        *(quantize, dequantize, quantize_absmax, dequantize_absmax, linear, linear_grad_input),
        *(lora_linear, lora_linear_backward, dense_linear, dense_grad_input, attention, attention_backward),
        *(rms_norm, rms_norm_backward, silu_gate, silu_gate_backward, gradient_norm, adamw),
    )
}
