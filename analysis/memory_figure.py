"""python -m analysis.memory_figure FILE: what training takes, component by component, for the models of one family.

FILE ends in .svg or .png. From `qlora_lab.memory`, so nothing is loaded and no run is needed. The README shows
analysis/memory.svg, which this command writes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.report.figures.style import COLOURS, FAINT, INK, STYLE
from qlora_lab.config.architecture import total_parameters
from qlora_lab.memory.plan import plan_memory
from qlora_lab.memory.usual import RANK, TOKENS, USUAL_SHAPE, usual_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # around a number, which may stand on a line

GIB = 2**30  # cards are named by these
MODELS = ("llama_7b", "llama_13b", "llama_33b", "llama_65b")
CARDS = (24, 48, 80)
# Components of a plan that are drawn as one, from below; the hatch tells them apart without any colour.
PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "4-bit weights, absmax": (("packed_weights", "absmax", "nested_absmax"), ""),
    "embeddings, head, norms": (("embeddings", "head", "dense_weights"), "//"),
    "adapters, gradients": (("adapters", "gradients"), ""),
    "optimizer states": (("optimizer",), "\\\\"),
    "activations, workspace": (("activations", "loss", "workspace", "not_at_once"), "xx"),
}


@dataclass(frozen=True)
class Bar:
    """One model: its size, and the bytes of each of PARTS."""

    label: str
    parts: tuple[int, ...]


def bars(models: Sequence[str]) -> list[Bar]:
    """Plan QLoRA training of each model, as `memory.usual` says."""
    from qlora_lab.config.catalogue import model_named  # imports Hydra

    found = []
    for name in models:
        config = usual_run(model_named(name))
        plan = plan_memory(config, USUAL_SHAPE)
        size = asdict(plan)
        parts = tuple(sum(size[component] for component in components) for components, _ in PARTS.values())
        assert sum(parts) == plan.training
        assert config.model.architecture is not None
        billions = (total_parameters(config.model.architecture) or 0) / 1e9
        found.append(Bar(f"{name.replace('_', ' ')}\n{billions:.1f} billion", parts))
    return found


def draw(found: Sequence[Bar]) -> "Figure":
    """Stack each model's parts, with the sizes of cards as lines across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(found)
    for number, (label, (_, hatch)) in enumerate(PARTS.items()):
        heights = [bar.parts[number] / GIB for bar in found]
        axes.bar(
            range(len(found)), heights, 0.6, below, label=label, color=COLOURS[number], hatch=hatch, edgecolor="white"
        )
        below = [start + height for start, height in zip(below, heights, strict=True)]
    for place, total in enumerate(below):
        axes.text(place, total + 0.8, f"{total:.1f}", ha="center", va="bottom", color=INK, bbox=BARE)
    for card in CARDS:
        axes.axhline(card, color=FAINT, linestyle="--", linewidth=1, zorder=0)
        axes.text(-0.62, card + 0.6, f"{card} GB card", ha="left", va="bottom", color=INK, fontsize=9)
    axes.set_xlim(-0.65, len(found) - 0.5)
    axes.set_ylim(0, max([*CARDS, *below]) * 1.08)
    axes.set_xticks(range(len(found)), [bar.label for bar in found])
    axes.set_ylabel("GiB")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(0.14, 0.92))
    axes.set_title(
        f"QLoRA, bfloat16 adapters of rank {RANK}, one row of {TOKENS} tokens, checkpointing (predicted)", loc="left"
    )
    return figure


def write(file: Path) -> None:
    """Draw the figure of MODELS into a file of either kind."""
    import matplotlib
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        matplotlib.rcParams["svg.hashsalt"] = "memory"  # the same figure is the same file
        figure = draw(bars(MODELS))
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, facecolor="white", metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.memory_figure", description=__doc__)
    parser.add_argument("file", type=Path, help="where to write it, .svg or .png")
    file = parser.parse_args().file
    if file.suffix not in (".svg", ".png"):
        parser.error(f"FILE must end in .svg or .png; got '{file}'")
    write(file)


if __name__ == "__main__":
    main()
