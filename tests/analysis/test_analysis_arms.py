"""Runs that differ only in their seed are one arm, with a name a person understands."""

from pathlib import Path

import pandas as pd

from analysis.load import load_runs
from analysis.study.arms import arms_of_runs, label_arms, varying_axes
from tests.analysis.study_folders import FakeRun, two_arms, write, write_run, write_study


def test_an_arm_is_named_by_the_axes_that_vary() -> None:
    places = {
        "a": {"data": "clean", "quant": "nf4", "adapter.rank": "4", "seed": "0"},
        "b": {"data": "clean", "quant": "nf4", "adapter.rank": "4", "seed": "1"},
        "c": {"data": "wrong", "quant": "nf4", "adapter.rank": "16", "seed": "0"},
    }
    assert label_arms(places) == {"a": "clean, rank=4", "b": "clean, rank=4", "c": "wrong, rank=16"}


def test_axes_that_end_alike_keep_their_whole_names() -> None:
    places = {"a": {"data.rows": 1, "evaluation.rows": 2}, "b": {"data.rows": 3, "evaluation.rows": 4}}
    assert label_arms(places)["a"] == "data.rows=1, evaluation.rows=2"


def test_a_study_of_seeds_alone_has_one_arm() -> None:
    assert set(label_arms({"a": {"seed": "0"}, "b": {"seed": "1"}}).values()) == {"all runs"}
    assert set(label_arms({"a": {"data": "clean", "seed": "0"}}).values()) == {"clean"}


def test_axes_are_found_without_a_plan_and_a_name_stands_for_its_group(tmp_path: Path) -> None:
    runs = [
        FakeRun(f"{data}{rank}", data, config={"adapter": {"rank": rank}, "data": {"source": {"path": data}}})
        for data in ("clean", "wrong")
        for rank in (4, 16)
    ]
    write_study(tmp_path, runs)
    frame = load_runs(tmp_path)
    axes = varying_axes(frame)
    assert axes == ["adapter.rank", "data"]  # data.source.path says no more than the name
    assert arms_of_runs(frame, axes)["wrong16"] == {"adapter.rank": 16, "data": "wrong"}


def test_the_same_name_with_another_setting_is_another_arm(tmp_path: Path) -> None:
    for rows in (128, 2048):
        write_run(tmp_path, FakeRun(f"run{rows}", config={"data": {"rows": rows}}))
    assert varying_axes(load_runs(tmp_path)) == ["data.rows"]


def test_a_group_without_a_name_is_told_by_what_differs_in_it(tmp_path: Path) -> None:
    write_run(tmp_path, FakeRun("a", config={"quant": {"format": "nf4", "double_quant": True}}))
    write_run(tmp_path, FakeRun("b", config={"quant": {"format": "none", "double_quant": False}}))
    frame = load_runs(tmp_path)
    assert arms_of_runs(frame, ["quant", "seed"])["b"] == {"quant": "format=none double_quant=False"}
    assert varying_axes(frame) == ["quant.double_quant"]  # the format adds nothing to it


def test_runs_without_seed_axis_or_configuration_have_a_place_all_the_same(tmp_path: Path) -> None:
    write_study(tmp_path, two_arms())
    write(tmp_path / "clean0" / "config.yaml", "a: [")
    frame = load_runs(tmp_path)
    assert arms_of_runs(frame, ["data"])["clean0"] == {"data": "unknown"}
    assert varying_axes(pd.DataFrame(frame[frame["seed"].notna()])) == ["data"]
