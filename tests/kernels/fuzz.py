"""Random calls of every C entry, for a build with sanitizers: python -m tests.kernels.fuzz --seconds 75 [--seed 0].

Every buffer is an allocation of its own that ends where its last element ends, begins at a random element, and is not
larger than the interface asks for, so that AddressSanitizer sees a read or write past it; what lies before it is
compared. Outputs start as NaN, and none may be left when the inputs are finite. One call in four has one bad argument
and must give its status and leave the outputs alone. Calls are numbered and drawn from (seed, number) alone:
`--first N --calls 1` repeats one. Without sanitizers it runs as well, and sees less.
"""

import argparse
import ctypes
import os
import sys
import time
from collections import Counter
from ctypes import byref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lab.ops.native.library import FILE, PATH_VARIABLE, SIGNATURES, AdamwView
from tests.kernels.fuzz_calls import BAD_ISA, ENTRIES, NO_MEMORY, OK, Arguments, Case

EXPECT_WRITES = "qlk_cpu_expect_writes"
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
    names = ("out_features", "in_features", "rank", "rows", "tokens")
    sizes = [getattr(view, name, 1) for view in views for name in names]
    names = ("numel", "blocks", "rows", "columns", "out_features", "in_features")
    sizes += [arguments.get(name, 1) for name in names]
    return 0 in sizes or any(view.numel == 0 for view in arguments.get("tensors", ()))


def spoil(arguments: Arguments, name: str, value: Any) -> None:
    """Put a bad value into a call."""
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
    for entry in (*ENTRIES, EXPECT_WRITES):
        functions[entry] = getattr(library, entry)
        functions[entry].argtypes = SIGNATURES[entry]
    return functions


def check_what_no_draw_gives(functions: dict[str, Any]) -> None:
    """Sizes that fit 64 bits but no memory, an unknown instruction set, and advice; nothing is read or written."""
    somewhere = torch.zeros(8)
    tensor = (AdamwView * 1)(AdamwView(gradient=somewhere.data_ptr(), numel=2**58))
    numbers = ctypes.c_double(), ctypes.c_int64()
    status = functions["qlk_cpu_gradient_norm"](tensor, 1, 1.0, *map(byref, numbers), 1)
    assert status == NO_MEMORY, status
    assert functions["use_isa"](b"avx3") == BAD_ISA
    large = torch.full((9_000_001,), 7, dtype=torch.uint8)  # from 8 MiB on
    for memory, size in ((large.data_ptr(), large.numel()), (large.data_ptr(), -1), (None, 2**62)):
        assert functions[EXPECT_WRITES](memory, size) == OK
    assert (large == 7).all()


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
