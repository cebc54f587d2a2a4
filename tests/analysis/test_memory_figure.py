"""The picture of what training takes: its bars are the plan's, and the committed one is up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import analysis
from analysis.memory_figure import CARDS, GIB, MODELS, PARTS, bars, draw, write
from qlora_lab.config.catalogue import model_named
from qlora_lab.memory.plan import plan_memory
from qlora_lab.memory.usual import USUAL_SHAPE, usual_run

COMMITTED = Path(analysis.__file__).parent / "memory.svg"


def test_the_bars_are_the_plan() -> None:
    for name, bar in zip(MODELS, bars(MODELS), strict=True):
        plan = plan_memory(usual_run(model_named(name)), USUAL_SHAPE)
        assert sum(bar.parts) == plan.total
        parts = dict(zip(PARTS, bar.parts, strict=True))
        assert parts["4-bit weights, absmax"] == plan.packed_weights + plan.absmax + plan.nested_absmax
        assert parts["activations, workspace"] == plan.activations + max(plan.loss, plan.workspace)


def test_each_size_is_one_stack_of_what_is_planned() -> None:
    (axes,) = draw(bars(MODELS)).axes
    drawn = {container.get_label(): list(container) for container in axes.containers}
    assert list(drawn) == list(PARTS)
    for place, bar in enumerate(bars(MODELS)):
        top = 0.0
        for (label, stacks), size in zip(drawn.items(), bar.parts, strict=True):
            assert len(stacks) == len(MODELS), label
            part = stacks[place]
            assert (part.get_y(), part.get_height()) == (pytest.approx(top), pytest.approx(size / GIB))
            assert part.get_x() + part.get_width() / 2 == pytest.approx(place)
            top += part.get_height()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [bar.label for bar in bars(MODELS)]


def heights(svg: str) -> list[float]:
    """Return the heights of the bars of a figure, as shares of the highest."""
    rectangles = re.findall(r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ [\d.]+ \nL [\d.]+ ([\d.]+) [^"]*" clip-path', svg)
    found = [abs(float(bottom) - float(top)) for bottom, top in rectangles]
    return [height / max(found) for height in found]


def test_the_committed_bars_are_those_of_the_command(tmp_path: Path) -> None:
    write(tmp_path / "now.svg")
    committed, now = (heights(file.read_text(encoding="utf-8")) for file in (COMMITTED, tmp_path / "now.svg"))
    assert len(now) >= len(MODELS) * len(PARTS)
    assert committed == pytest.approx(now, abs=1e-3)


def test_the_committed_figure_shows_what_is_planned_today(tmp_path: Path) -> None:
    drawn = COMMITTED.read_text(encoding="utf-8")
    for bar in bars(MODELS):
        assert f">{sum(bar.parts) / GIB:.1f}<" in drawn
        assert all(f">{line}<" in drawn for line in bar.label.split("\n"))
    assert all(f">{label}<" in drawn for label in (*PARTS, *(f"{card} GB card" for card in CARDS)))
    for file in (tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "a.png"):
        write(file)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_needs_a_known_kind_of_file_and_no_torch() -> None:
    code = "import analysis.memory_figure, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    wrong = subprocess.run([sys.executable, "-m", "analysis.memory_figure", "f.gif"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "FILE must end in .svg or .png; got 'f.gif'" in wrong.stderr
