"""Write the tables of the number formats as a C++ header: python generate_tables.py HEADER.

The formats have one home, qlora_lab/ops/formats.py; this runs when the kernels are built.
"""

import math
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from struct import pack, unpack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_lab.ops.formats import FORMATS, Format, dynamic_map_levels

HEAD = """// Written by kernels/generate_tables.py from qlora_lab/ops/formats.py; change the formats there.
#pragma once

#include <stdint.h>

namespace qlk {

// One number format. A value gets the code of its rank, which is the number of midpoints strictly below it.
struct Format {
    const char *name;
    int bits;               // 4 or 8
    int levels;             // how many values it has
    float midpoints[256];   // between neighbouring levels, ascending; the rest is infinity
    uint8_t code[256];      // of each rank
    float value[256];       // of each code
};

"""


def float32(x: float) -> float:
    return float(unpack("f", pack("f", x))[0])


def midpoints(levels: Iterable[float]) -> list[float]:
    """Return what lies half way between float32 levels, rounded as float32 arithmetic does."""
    ascending = [float32(level) for level in levels]
    between = [float32(float32(low + high) / 2) for low, high in pairwise(ascending)]
    return between + [math.inf] * (256 - len(between))


def floats(values: Iterable[float]) -> str:
    """Return C++ literals that hold each float32 exactly."""
    return ", ".join("__builtin_inff()" if math.isinf(value) else f"{value.hex()}f" for value in map(float32, values))


def format_initializer(fmt: Format) -> str:
    codes = list(fmt.codes) + [fmt.codes[-1]] * (256 - len(fmt.codes))
    values = list(fmt.values_by_code())
    values += [0.0] * (256 - len(values))
    return (
        f'    {{"{fmt.name}", {fmt.bits}, {len(fmt.levels)},\n     {{{floats(midpoints(fmt.levels))}}},\n'
        f"     {{{', '.join(map(str, codes))}}},\n     {{{floats(values)}}}}},\n"
    )


def header() -> str:
    lines = [HEAD, f"constexpr int FORMAT_COUNT = {len(FORMATS)};\n", "inline constexpr Format FORMATS[] = {\n"]
    lines += [format_initializer(fmt) for fmt in FORMATS.values()]
    lines.append("};\n")
    for name, signed in (("DYNAMIC", True), ("UNSIGNED_DYNAMIC", False)):
        levels = dynamic_map_levels(signed=signed)
        lines.append(f"inline constexpr float {name}_LEVELS[256] = {{{floats(levels)}}};\n")
        lines.append(f"inline constexpr float {name}_MIDPOINTS[256] = {{{floats(midpoints(levels))}}};\n")
    lines.append("\n}  // namespace qlk\n")
    return "".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[1]).write_text(header())
