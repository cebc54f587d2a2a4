"""Figures show what the frames say, can be read without colour, and are vectors."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.report.figures.curves import curve_figure, group_curves, run_curves, thinned
from analysis.report.figures.ratings import ratings_figure
from analysis.report.figures.scaling import scaling_figure
from analysis.report.figures.settings import (
    axis_figure,
    cost_figure,
    heat_map,
    ordered,
    parallel_figure,
    within_blocks,
)
from analysis.report.figures.style import look, save, to_svg
from qlora_lab.ratings.files import AnswerFiles
from qlora_lab.ratings.judgments import Judgment
from qlora_lab.tournament import Settings, tournament

LOSS = "eval/loss"


def runs_of(losses: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Return a run for every loss of a model and a data set."""
    rows = [
        {"model": model, "data": data, LOSS: loss, "train/time_s": 10.0 + 100 * n, "total_parameters": sizes(model)}
        for (model, data), of_cell in losses.items()
        for n, loss in enumerate(of_cell)
    ]
    return pd.DataFrame(rows)


def sizes(model: str) -> float:
    return {"t_80m": 8e7, "t_3b": 3e9, "t_780m": 7.8e8}[model]


RUNS = runs_of(
    {("t_80m", "a"): [3.0, 3.2], ("t_780m", "a"): [2.0, 2.2], ("t_3b", "a"): [1.0, 1.2], ("t_3b", "b"): [1.5, 1.7]}
)


def texts(figure: Figure) -> list[str]:
    [axes] = figure.axes
    return [text.get_text() for text in axes.texts]


def ticks(figure: Figure, which: str = "x") -> list[str]:
    [axes] = figure.axes
    return [label.get_text() for label in (axes.get_xticklabels() if which == "x" else axes.get_yticklabels())]


def test_series_are_told_apart_by_more_than_colour() -> None:
    looks = [look(number) for number in range(12)]
    assert all(a.dashes != b.dashes and a.marker != b.marker for a, b in pairwise(looks))
    assert len({(its.colour, str(its.dashes)) for its in map(look, range(30))}) == 30


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["llama_65b", "llama_7b", "smollm2_135m"], ["smollm2_135m", "llama_7b", "llama_65b"]),
        (["64", "8", "16"], ["8", "16", "64"]),
        (["nf4", "fp4", "none"], ["fp4", "nf4", "none"]),
        (["3b", "none"], ["3b", "none"]),
    ],
)
def test_settings_are_in_the_order_of_their_sizes(given: list[str], expected: list[str]) -> None:
    assert ordered(pd.Series(given)) == expected


def test_a_group_is_the_mean_of_its_runs_over_the_steps_that_all_have() -> None:
    curves = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [3.0, 4.0, np.nan], "c": [9.0, 9.0, 9.0]}, index=[1, 2, 3])
    found = group_curves(curves, {"c": "other", "a": "one", "b": "one", "gone": "one"})
    assert list(dict.fromkeys(found["group"])) == ["other", "one"]
    one = found[found["group"] == "one"]
    assert one[["step", "mean", "low", "high", "seeds"]].to_numpy().tolist() == [[1, 2, 1, 3, 2], [2, 3, 2, 4, 2]]


def test_curves_logged_at_other_steps_are_interpolated_and_never_extended() -> None:
    history = pd.DataFrame(
        {"run_id": ["a"] * 3 + ["b"] * 2, "step": [0, 2, 4, 1, 3], "train/loss": [0.0, 2.0, 4.0, 1.0, 3.0]}
    )
    curves, window = run_curves(history, ["a", "b"], "train/loss")
    assert window == 1
    np.testing.assert_array_equal(curves["a"], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(curves["b"], [np.nan, 1, 2, 3, np.nan])


def test_runs_that_stopped_are_crosses_and_in_no_mean() -> None:
    history = pd.DataFrame(
        [{"run_id": run, "step": s, "train/loss": float(s + at)} for at, run in enumerate("abx") for s in range(9)]
    )
    figure = curve_figure(history, dict.fromkeys("abx", "arm"), stopped={"x"})
    assert figure is not None
    [axes] = figure.axes
    mean, *stopped = axes.lines
    np.testing.assert_allclose(mean.get_ydata(), np.arange(9) + 0.5)
    assert [line.get_marker() for line in stopped] == ["None", "x"]
    assert curve_figure(history, {"nobody": "arm"}) is None
    assert curve_figure(history, dict.fromkeys("ab", "arm"), "eval/loss") is None


def test_long_curves_keep_their_ends() -> None:
    points = pd.DataFrame({"step": range(1000)})
    assert thinned(points, 300)["step"].iloc[[0, -1]].tolist() == [0, 999]
    assert len(thinned(points, 300)) == 300


def test_a_setting_is_drawn_with_means_and_t_intervals() -> None:
    figure = axis_figure(RUNS, "model", LOSS, by="data")
    assert ticks(figure) == ["t_80m", "t_780m", "t_3b"]
    [axes] = figure.axes
    of_a, of_b = (line for line in axes.lines if line.get_label() in ("a", "b"))
    np.testing.assert_allclose(of_a.get_ydata(), [3.1, 2.1, 1.1])
    np.testing.assert_allclose(of_b.get_ydata(), [1.6])
    interval = axes.lines[0].get_ydata()
    half = 12.706 * 0.1  # Student's t with one degree of freedom, times the standard error of two values
    np.testing.assert_allclose(interval, [3.1 - half, 3.1 + half], rtol=1e-4)


def test_what_blocks_have_of_their_own_is_taken_out_of_a_setting() -> None:
    losses = {
        ("t_80m", "a"): [9.0, 9.2],
        ("t_780m", "a"): [8.0, 8.2],
        ("t_3b", "b"): [3.0, 3.2],
        ("t_780m", "b"): [4.0, 4.2],
    }
    losses |= {("t_80m", "c"): [0.1, 0.2, 0.3]}
    runs = runs_of(losses)
    placed = within_blocks(runs, "model", LOSS, "data")
    means = placed.groupby("model")[LOSS].mean()
    assert means["t_80m"] - means["t_780m"] == pytest.approx(1) == means["t_780m"] - means["t_3b"]
    assert sorted(placed["data"].unique()) == ["a", "b"], (
        "c has one size: its runs would lie on the mean, to no purpose"
    )
    [axes] = axis_figure(runs, "model", LOSS, blocks="data", label="size").axes
    assert axes.get_xlabel() == "size" and "within blocks" in axes.get_ylabel()
    drawn = axes.lines[-1].get_ydata()
    np.testing.assert_allclose(np.diff(drawn), [-1, -1])
    assert len(axes.lines) == 4, "the runs of each value and the means, but no interval: blocks lack values"


def test_a_heat_map_writes_every_mean_and_leaves_no_cell_guessed() -> None:
    figure = heat_map(RUNS, "model", "data", LOSS)
    assert texts(figure) == ["3.10", "no run", "2.10", "no run", "1.10", "1.60"]
    assert ticks(figure, "y") == ["t_80m", "t_780m", "t_3b"]
    [mesh] = figure.axes[0].collections
    shades = np.asarray(mesh.get_array()).ravel()
    assert shades[4] == 1 and shades[0] == 0  # the lowest loss is the darkest
    assert np.asarray(heat_map(RUNS, "model", "data", LOSS, goal="max").axes[0].collections[0].get_array())[0, 0] == 1


def test_parallel_coordinates_draw_the_best_group_strongest_and_last() -> None:
    groups = RUNS.groupby(["model", "data"], as_index=False)[LOSS].mean()
    figure = parallel_figure(groups, ["model", "data"], LOSS)
    [axes] = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(lines) == 4
    assert lines[-1].get_linewidth() == max(line.get_linewidth() for line in lines)
    assert lines[-1].get_ydata()[-1] == 0  # the lowest loss
    assert {"t_80m", "t_3b", "a", "b", "1.10", "3.10"} <= set(texts(figure))


def test_one_group_alone_can_be_drawn() -> None:
    one = RUNS.head(1)
    parallel_figure(one, ["model", "data"], LOSS)
    assert texts(heat_map(one, "model", "data", LOSS)) == ["3.000"]
    axis_figure(one, "model", LOSS)


def test_scaling_is_over_parameters_on_a_logarithmic_axis() -> None:
    figure = scaling_figure(RUNS, LOSS, by="data")
    assert ticks(figure) == ["80M", "780M", "3B"]
    assert figure.axes[0].get_xscale() == "log"
    near = RUNS.replace({"total_parameters": {7.8e8: 9e7}})
    assert ticks(scaling_figure(near, LOSS)) == ["80M", "3B"]


def test_costs_far_apart_are_on_a_logarithmic_axis() -> None:
    assert cost_figure(RUNS, "train/time_s", LOSS).axes[0].get_xscale() == "linear"
    far = RUNS.assign(**{"train/time_s": np.geomspace(1, 1000, len(RUNS))})
    assert cost_figure(far, "train/time_s", LOSS, by="data").axes[0].get_xscale() == "log"


def test_ratings_are_drawn_from_what_the_tournament_tells() -> None:
    rng = np.random.default_rng(0)
    judgments = [
        Judgment(f"q{n}", first, second, str(rng.choice(["first", "second", "tie"])), "judge")
        for n in range(30)
        for first, second in (("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("a", "c"), ("c", "a"))
    ]
    told: dict[str, Any] = tournament(judgments, Settings(draws=20, orders=20), AnswerFiles())
    figure = ratings_figure(told)
    assert ticks(figure, "y") == [row["system"] for row in told["systems"]]
    drawn = [tuple(line.get_xdata()) for line in figure.axes[0].lines]
    assert all((row["rating_low"], row["rating_high"]) in drawn for row in told["systems"])


def test_a_figure_is_saved_as_the_same_vectors_each_time(tmp_path: Path) -> None:
    for name in ("one/f.svg", "other/f.svg"):
        (tmp_path / name).parent.mkdir()
        save(axis_figure(RUNS, "model", LOSS), tmp_path / name)
    assert (tmp_path / "one/f.svg").read_bytes() == (tmp_path / "other/f.svg").read_bytes()
    assert "<image" not in (tmp_path / "one/f.svg").read_text()
    save(axis_figure(RUNS, "model", LOSS), tmp_path / "f.pdf")
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")


def test_inline_svg_rounds_points_and_no_text() -> None:
    figure = axis_figure(RUNS, "model", LOSS)
    figure.axes[0].set_title("0.123456789 < 1")
    svg = to_svg(figure, "a & b")
    assert "0.123456789 &lt; 1" in svg
    assert 'aria-label="a &amp; b"' in svg
    assert not [d for d in re.findall(r' d="([^"]*)"', svg) if re.search(r"\.\d{3}", d)]


def test_many_marks_are_an_image() -> None:
    many = pd.concat([RUNS] * 80)
    assert "<image" in to_svg(axis_figure(many, "model", LOSS), "many")
