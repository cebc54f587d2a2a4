"""A benchmark's JSON as Markdown tables: python kernels/bench/table.py FILE.json [MORE.json ...].

One table for each dtype, a column for each shape. A cell says: milliseconds of ours; how many times as long each other
implementation takes (above 1, ours is faster), in the order of the heading; the share of its floor that ours reaches,
and whether that floor is of the bytes (b) or the operations (o) (rounds.py), or "floor not valid" where ours is faster
than what should bound it.
"""

import json
import sys
from pathlib import Path
from typing import Any

ABSENT = "–"
LARGEST_SHARE = 1.05  # two loops of the same work differ by as much; above, the loop is no floor of the cell
SHORT = {f"torch {work}": "torch" for work in ("clone", "copy", "dense", "fused")}


def others_of(cells: list[dict[str, Any]]) -> list[str]:
    """Return the other implementations of these cells, under the names of the heading."""
    return list(dict.fromkeys(SHORT.get(name, name) for cell in cells for name in cell["ratio"]))


def bound(cell: dict[str, Any]) -> str:
    """Return which of the two floors is the longer one."""
    floors: dict[str, float] = cell["floor_ms"]
    return max(floors, key=lambda name: floors[name])


def share_of_floor(cell: dict[str, Any]) -> str:
    share = cell["share_of_floor"]
    if not share:
        return ""
    return "floor not valid" if share > LARGEST_SHARE else f"{100 * share:.0f} % {bound(cell)[0]}"


def entry(cell: dict[str, Any] | None, others: list[str]) -> str:
    if cell is None:
        return ABSENT
    ratios = {SHORT.get(name, name): ratio for name, ratio in cell["ratio"].items()}
    shown = ", ".join(f"{ratios[name]:.3g}" if name in ratios else ABSENT for name in others)
    return f"{cell['ms']['ours']:.3g} ({'; '.join(filter(None, (shown, share_of_floor(cell))))})"


def table(title: str, cells: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Return one table of (row, column, cell)."""
    others = others_of([cell for _, _, cell in cells])
    rows, columns = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    found = {(row, column): cell for row, column, cell in cells}
    floor = "; share of the floor" if any(cell["share_of_floor"] for _, _, cell in cells) else ""
    heading = f"| {title}: ms ({', '.join(others)}{floor}) | " + " | ".join(columns) + " |"
    lines = [heading, "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        entries = " | ".join(entry(found.get((row, column)), others) for column in columns)
        lines.append(f"| {row} | {entries} |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    """Return the machine in a sentence, and a table for each dtype (or one, where cells name none)."""
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    sentence = (
        f"{results['machine']}; {results['kernels']}; {packages}; medians of {results['rounds']} rounds, "
        f"{results['clock']} time."
    )
    by_title: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for cell in results["cells"]:
        words = cell["cell"].split(" ", 2)
        if words[0] in ("fp32", "bf16"):
            by_title.setdefault(words[0], []).append((words[2], words[1], cell))
        else:
            by_title.setdefault("work", []).append((cell["cell"], "ours", cell))
    return "\n\n".join([sentence, *(table(title, cells) for title, cells in by_title.items())])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n\n".join(tables(json.loads(Path(name).read_text())) for name in sys.argv[1:]))
