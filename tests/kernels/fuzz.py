"""Random calls of every C entry, for a build with sanitizers: python -m tests.kernels.fuzz --seconds 75 [--seed 0].

Every buffer is an allocation of its own that ends where its last element ends, begins at a random element, and is not
larger than the interface asks for, so that AddressSanitizer sees a read or write past it; what lies before it is
compared. Outputs start as NaN, and none may be left when the inputs are finite. One call in four has one bad argument
and must give its status and leave the outputs alone. Calls are numbered and drawn from (seed, number) alone:
`--first N --calls 1` repeats one. Without sanitizers it runs as well, and sees less.
"""

import argparse
import ctypes
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from ctypes import byref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.native.library import FILE, PATH_VARIABLE, SIGNATURES, AdamwView, AdapterView, WeightView

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
        return self.random.randint(-1, 4)

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
    rows, out_features, in_features, dtype, weight, parts = product(case)
    arguments = {
        "x": case.values(rows * in_features, DTYPES[dtype]),
        "dtype": dtype,
        "rows": rows,
        "weight": weight,
        "bias": case.values(out_features, DTYPES[dtype]) if case.random.random() < 0.5 else None,
        "out": case.output(rows * out_features, DTYPES[dtype]),
        "parts": parts,
    }
    return arguments, [*PRODUCT_SPOILERS, *nulls("x", "out")]


def linear_grad_input(case: Case) -> Built:
    rows, out_features, in_features, dtype, weight, parts = product(case)
    arguments = {
        "grad_output": case.values(rows * out_features, DTYPES[dtype]),
        "dtype": dtype,
        "rows": rows,
        "weight": weight,
        "out": case.output(rows * in_features, DTYPES[dtype]),
        "parts": parts,
    }
    return arguments, [*PRODUCT_SPOILERS, *nulls("grad_output", "out")]


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
        tensors = [case.values(numel), case.values(numel)]
        if case.random.random() < 0.5:
            tensors += [case.values(numel), case.values(numel, positive=True)]
        else:
            blocks = -(-numel // block_size)
            tensors += [case.codes(numel), case.codes(numel)]
            tensors += [case.values(blocks, positive=True), case.values(blocks, positive=True)]
        pointers = [tensor.data_ptr() for tensor in tensors] + [None] * (6 - len(tensors))
        views[index] = AdamwView(*pointers, numel, 0.01, 0)
        kept += tensors
    return views, kept


TENSOR_SPOILERS: Spoilers = [
    *nulls("tensors", "tensors.gradient"),
    ("tensors.numel", TOO_LARGE, BAD_SIZE),
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
        *(lora_linear, lora_linear_backward, gradient_norm, adamw),
    )
}
KEPT = {"parts", "matrices", "kept"}  # not arguments, but what they point to


def call(function: Any, arguments: Arguments, threads: int) -> int:
    given = []
    for name, value in arguments.items():
        if name in KEPT:
            continue
        if isinstance(value, Tensor):
            value = value.data_ptr() if value.numel() else None
        elif isinstance(value, ctypes.Structure | ctypes.c_double | ctypes.c_int64):
            value = byref(value)
        given.append(value)
    return int(function(*given, threads))


def is_empty(arguments: Arguments) -> bool:
    """Whether any size of a call is 0: bad pointers may then be no reason to refuse it."""
    views = [value for value in arguments.values() if isinstance(value, ctypes.Structure)]
    sizes = [getattr(view, name, 1) for view in views for name in ("out_features", "in_features", "rank")]
    sizes += [arguments.get(name, 1) for name in ("numel", "blocks", "rows")]
    return 0 in sizes or any(view.numel == 0 for view in arguments.get("tensors", ()))


def spoil(arguments: Arguments, name: str, value: Any) -> Any:
    """Put a bad value into a call; return what keeps it alive."""
    outer, _, field = name.partition(".")
    if not field:
        arguments[outer] = value
    elif outer == "tensors":
        setattr(arguments[outer][len(arguments[outer]) - 1], field, value)
    else:
        setattr(arguments[outer], field, value)


def run_case(functions: dict[str, Any], seed: int, number: int, verbose: bool) -> tuple[str, int]:
    """Run one call; return the entry and the status it gave."""
    case = Case(seed, number)
    entry = case.random.choice(list(ENTRIES))
    isa = case.random.choice(functions["isas"]().split())
    assert functions["use_isa"](isa) == OK
    arguments, spoilers = ENTRIES[entry](case)
    expected, bad = OK, ""
    if case.random.random() < 0.25 and not is_empty(arguments):
        name, values, expected = case.random.choice(spoilers)
        spoil(arguments, name, value := case.random.choice(values))
        bad = f"{name}={value}"
    if verbose:
        print(f"{number}: {entry} {isa.decode()} {bad}", flush=True)
    try:
        status = call(functions[entry], arguments, case.threads())
        assert status == expected, f"status {status} instead of {expected}"
        case.check(refused=expected != OK)
    except AssertionError as error:
        raise AssertionError(f"call {number} of seed {seed}, {entry} {isa.decode()} {bad}: {error}") from error
    return entry, status


def load(path: Path) -> dict[str, Any]:
    library = ctypes.CDLL(str(path))
    functions: dict[str, Any] = {"use_isa": library.qlk_cpu_use_isa, "isas": library.qlk_cpu_isas}
    functions["isas"].restype = ctypes.c_char_p
    for entry in ENTRIES:
        functions[entry] = getattr(library, entry)
        functions[entry].argtypes = SIGNATURES[entry]
    return functions


def check_what_no_draw_gives(functions: dict[str, Any]) -> None:
    """Sizes that fit 64 bits but no memory, and an unknown instruction set; nothing is read or written."""
    somewhere = torch.zeros(8)
    tensor = (AdamwView * 1)(AdamwView(gradient=somewhere.data_ptr(), numel=2**58))
    numbers = ctypes.c_double(), ctypes.c_int64()
    status = functions["qlk_cpu_gradient_norm"](tensor, 1, 1.0, *map(byref, numbers), 1)
    assert status == NO_MEMORY, status
    assert functions["use_isa"](b"avx3") == BAD_ISA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=2**62, help="end after this many")
    parser.add_argument("--verbose", action="store_true", help="print every call before it is made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    functions = load(Path(os.environ[PATH_VARIABLE]) / FILE)
    check_what_no_draw_gives(functions)
    seen: Counter[tuple[str, int]] = Counter()
    ends, number = time.monotonic() + options.seconds, options.first
    while time.monotonic() < ends and number < options.first + options.calls:
        seen[run_case(functions, options.seed, number, options.verbose)] += 1
        number += 1
    print(f"{number - options.first} calls from number {options.first} of seed {options.seed}")
    for entry, build in ENTRIES.items():
        statuses = {OK, *(status for _, _, status in build(Case(0, 0))[1])}
        counts = {status: seen[entry, status] for status in sorted(statuses)}
        print(f"  {entry:<30} status: calls  {counts}")
        if options.calls > 10_000 and not all(counts.values()):
            sys.exit(f"{entry} was not called with every status; give it more --seconds")


if __name__ == "__main__":
    main()
