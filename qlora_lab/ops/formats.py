"""The number formats of quantized weights: each is a table of levels and the code that stands for each level.

A block of weights is divided by its largest magnitude (its absmax), so every level lies in [-1, 1]. The same
rule rounds every format: a value gets the level whose rank is the number of midpoints strictly below it, so a
tie goes to the lower level. tests/ops/test_formats.py derives each table from its definition.

This is the one place where the tables stand: the native kernels are built from it (kernels/generate_tables.py),
so it imports nothing heavy.
"""

from dataclasses import dataclass
from itertools import pairwise
from struct import pack, unpack

from qlora_lab.errors import ConfigError, unknown_name


@dataclass(frozen=True, eq=False)  # known by identity: tables are looked up by format in every call
class Format:
    """One number format.

    Attributes:
        name: as in `quant.format`.
        bits: 4 (two codes in a byte, the first weight in the high half) or 8.
        levels: the values, ascending, from -1 to 1; at most 2 ** bits.
        codes: the stored code of each level.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    codes: tuple[int, ...]

    def packed_bytes(self, numel: int) -> int:
        """Return the bytes that hold `numel` codes."""
        return (numel * self.bits + 7) // 8

    def values_by_code(self) -> tuple[float, ...]:
        """Return the value of every code; a code that no level uses decodes to zero."""
        value_of = dict(zip(self.codes, self.levels, strict=True))
        return tuple(value_of.get(code, 0.0) for code in range(2**self.bits))


# Quantiles of the normal distribution with an exact zero, 8 levels above and 7 below it, divided by the largest.
# Source: Dettmers et al. 2023, "QLoRA", appendix E.
NF4 = Format(
    name="nf4",
    bits=4,
    levels=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    codes=tuple(range(16)),
)

# Sign, two exponent bits, one mantissa bit, as bitsandbytes lays them out: the exponent counts downwards from
# field 1, and code 1 is a subnormal far below its neighbours. Zero has two codes; a midpoint lies between them.
FP4_E2M1 = Format(
    name="fp4_e2m1",
    bits=4,
    levels=(
        *(-1.0, -2 / 3, -1 / 2, -1 / 3, -1 / 4, -1 / 6, -1 / 192, 0.0),
        *(0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0),
    ),
    codes=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
)

# Sign and three exponent bits: powers of two and zero. Code 8, the negative zero, is never written.
FP4_E3M0 = Format(
    name="fp4_e3m0",
    bits=4,
    levels=(
        *(-1.0, -1 / 2, -1 / 4, -1 / 8, -1 / 16, -1 / 32, -1 / 64),
        0.0,
        *(1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    ),
    codes=(15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7),
)


def _symmetric_integer(name: str, bits: int) -> Format:
    """Return k / largest for every integer |k| <= largest, stored in two's complement."""
    largest = 2 ** (bits - 1) - 1
    integers = range(-largest, largest + 1)
    return Format(
        name=name,
        bits=bits,
        levels=tuple(k / largest for k in integers),
        codes=tuple(k % 2**bits for k in integers),
    )


INT4 = _symmetric_integer("int4", bits=4)
INT8 = _symmetric_integer("int8", bits=8)

# NF4's construction with 2^k levels, 2^(k-1) above zero and 2^(k-1) - 1 below it. They answer what fewer levels cost in
# accuracy and save no memory: a code takes a whole nibble, as NF4's does, and 8 or 12 of its 16 values stay unused.
NF3 = Format(
    name="nf3",
    bits=4,
    levels=(
        -1.0,
        -0.5350227355957031,
        -0.24693143367767334,
        0.0,
        0.1833374798297882,
        0.38199394941329956,
        0.6229857206344604,
        1.0,
    ),
    codes=tuple(range(8)),
)
NF2 = Format(name="nf2", bits=4, levels=(-1.0, 0.0, 0.4358181655406952, 1.0), codes=tuple(range(4)))

# Native kernels know a format by its place in this order: new ones go to the end.
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (NF4, FP4_E2M1, FP4_E3M0, INT4, INT8, NF3, NF2)}


def format_named(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(unknown_name("format", name, FORMATS))
    return FORMATS[name]


def dynamic_map_levels(*, signed: bool) -> tuple[float, ...]:
    """Return the 256 levels of the 8-bit dynamic data type, ascending.

    Seven decades, from 1e-6 to 1; each is cut into twice as many equal slices as the one below it, and the
    middle of every slice is a level, with either sign if `signed` (then of half as many slices). Zero and one
    complete the map. Every step is rounded to float32, as torch does it for bitsandbytes.

    Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning".
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = _float32_steps(0.1, 1.0, 2 ** (decade if signed else decade + 1))
        scale = _float32(10.0 ** (decade - 6))
        middles = [_float32(scale * _float32(low + high)) / 2 for low, high in pairwise(edges)]
        levels += middles + ([-middle for middle in middles] if signed else [])
    return tuple(sorted(levels))


def _float32_steps(start: float, end: float, steps: int) -> list[float]:
    """Return steps + 1 float32 values at equal distances, counted from the nearer end as torch.linspace does."""
    first, last = _float32(start), _float32(end)
    step = _float32(_float32(last - first) / steps)
    return [
        _float32(first + step * i) if i < (steps + 1) // 2 else _float32(last - step * (steps - i))
        for i in range(steps + 1)
    ]


def _float32(x: float) -> float:
    """Round to the nearest float32."""
    return float(unpack("f", pack("f", x))[0])
