"""What all figures share: series differ in colour, dashes and markers, so that every figure can be read in grey.

matplotlib is imported where a figure is drawn: tables and sentences never wait for it.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.study.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Tol's "bright" scheme: told apart with any colour vision, on white and on black
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^DvPX"
INK, FAINT, PAPER = "#1f2428", "#9aa4ad", "#fffffe"  # become the page's own colours in SVG
WIDTH_INCHES = 7.6
LABEL_CHARACTERS = 36  # longer ones are wrapped, or get a line of a legend for themselves
LEGEND_LINE_INCHES = 0.22
# More than this are drawn as an image inside the SVG, which stays small: points of lines, and marks with a shape.
RASTER_POINTS, RASTER_MARKS = 5_000, 400
COORDINATES, DIGITS = (
    re.compile(r' (?:d|x|y|transform)="[^"]*"'),
    re.compile(r"(\.\d\d)\d+"),
)  # points have two decimals
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a regex of an adapter's layers has dollars
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Look:
    """What tells one series from the others, any of them enough with few series."""

    colour: str
    dashes: Any
    marker: str


def look(number: int) -> Look:
    """Return the look of a series by its place; the first thirty differ in colour or dashes."""
    return Look(COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)])


@contextmanager
def styled() -> Iterator[None]:
    """Draw in STYLE, whatever the user's own matplotlib settings are."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(height: float, panels: int = 1, width: float = WIDTH_INCHES) -> "tuple[Figure, list[Axes]]":
    """Return a figure without pyplot's global state, and its panels, one below the other; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def legend_above(axes: "Axes", columns: int = 1, **options: Any) -> None:
    places: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "handlelength": 2.4}
    axes.legend(ncols=columns, **(places | options))


def legend_columns(labels: list[str]) -> int:
    return 2 if max(map(len, labels)) <= LABEL_CHARACTERS else 1


def axis_label(metric: Metric) -> str:
    unit = "% of rows" if metric.kind == "share" else "GB" if metric.kind == "bytes" else metric.unit
    return f"{metric.name} ({unit})" if unit else metric.name


def scale_of(metric: Metric) -> float:
    """Return what values are multiplied with to be in the unit of `axis_label`."""
    return {"share": 100.0, "bytes": 1e-9}.get(metric.kind, 1.0)


@styled()
def to_svg(figure: "Figure", description: str) -> str:
    """Return the figure as inline SVG: as wide as its place, text as text, ink in the page's colours.

    Args:
        description: what a reader who cannot see it is told.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = description  # the same figure is the same text; no id is there twice
    _lay_out(figure)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = re.sub(r"^.*?<svg", "<svg", buffer.getvalue(), count=1, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
    svg = COORDINATES.sub(lambda found: DIGITS.sub(r"\1", found[0]), svg)
    # the browser's own font; matplotlib's is not on every machine
    svg = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)").replace(PAPER, "var(--page)")


def _lay_out(figure: "Figure") -> None:
    """Lay a figure out for good; saving one that is not draws everything once more for it."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


@styled()
def save(figure: "Figure", file: Path) -> None:
    """Write a figure on white for a paper: .svg or .pdf (vector), or .png; the same figure is the same SVG file."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = file.stem
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix)
    figure.savefig(file, facecolor="white", metadata=metadata, dpi=200)
