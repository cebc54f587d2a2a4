"""What may be compared, and what is said of runs and rows that may not be: other tokens, not finite, failed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.load import load_runs
from analysis.report.terminal import what_happened
from analysis.statistics.verdicts import Verdict
from analysis.study.answer import compare
from analysis.study.comparison import MOST_ARMS_PAIRED
from tests.analysis.study_folders import FakeRun, answered, runs_of, two_arms, write_json, write_lines, write_run


def test_losses_a_token_are_not_compared_between_tokenizers(tmp_path: Path) -> None:
    runs = [replace(run, token_scale=3) if run.data != "procedural_clean_128" else run for run in two_arms()]
    answer = answered(tmp_path, runs)
    assert answer.arms[0] == "procedural_half_wrong_2048"  # a third of the nats a token, and worse all the same
    assert answer.comparisons[0].verdict is Verdict.OTHER_TOKENS
    assert math.isnan(answer.comparisons[0].adjusted_p)
    assert answer.sentence == (
        "procedural_half_wrong_2048 and procedural_clean_128 cannot be compared in eval/loss: their targets are "
        "counted in different tokens; compare eval/bits_per_byte instead."
    )
    assert "study.metric=eval/bits_per_byte compares them" in answer.notes[0]
    by_byte = compare(load_runs(tmp_path), ["data"], "eval/bits_per_byte", "min")
    assert by_byte.comparisons[0].separated
    assert by_byte.arms[0] == "procedural_clean_128"
    assert by_byte.notes == []


def test_losses_over_targets_cut_at_different_lengths_are_not_compared(tmp_path: Path) -> None:
    runs = [*two_arms(), *(FakeRun(f"cut{s}", "cut", s, mean_loss=0.2, byte_scale=2, token_scale=2) for s in (0, 1))]
    for run in runs:
        write_run(tmp_path, run)
    for metric in ("eval/loss", "eval/bits_per_byte"):
        answer = compare(load_runs(tmp_path), ["data"], metric, "min")
        assert answer.arms[0] == "cut"
        refused = [pair.verdict is Verdict.OTHER_TARGETS for pair in answer.comparisons]
        assert refused == ["cut" in (pair.first, pair.second) for pair in answer.comparisons]
        assert "cannot be compared in" in answer.sentence or "not comparable with" in answer.sentence
        assert "the same limits of evaluation" in answer.notes[0]
        others = next(pair for pair in answer.comparisons if pair.first != "cut")
        assert others.separated  # the third arm's seeds, in other units, do not widen its interval
        assert others.n_comparisons == 1
    exact = compare(load_runs(tmp_path), ["data"], "eval/exact_match", "max")
    assert {pair.refused for pair in exact.comparisons} == {None}


def with_right_rows(folder: Path, count: int) -> None:
    """Let the first `count` rows of a run be right, and no other."""
    rows = [json.loads(line) for line in (folder / "evaluation" / "rows.jsonl").read_text().splitlines()]
    write_lines(folder / "evaluation" / "rows.jsonl", [row | {"exact_match": n < count} for n, row in enumerate(rows)])
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["eval/exact_match"] = count / len(rows)
    write_json(folder / "result.json", result)


def test_equal_means_of_seeds_that_differ_are_not_the_same(tmp_path: Path) -> None:
    for arm, right in (("one", (60, 50)), ("two", (50, 60))):
        for seed, count in enumerate(right):
            with_right_rows(write_run(tmp_path, FakeRun(f"{arm}{seed}", arm, seed)), count)
    answer = compare(load_runs(tmp_path), ["data"], "eval/exact_match", "max")
    assert answer.sentence.startswith("The runs do not separate one and two: their seeds differ in eval/exact_match,")
    assert answer.sentence.endswith("and the interval holds 0.")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, None])
def test_a_metric_that_is_not_finite_was_not_measured(tmp_path: Path, value: float | None) -> None:
    runs = [replace(run, metrics={"eval/loss": value}) if run.run_id == "wrong1" else run for run in two_arms()]
    answer = answered(tmp_path, runs)
    assert list(answer.not_counted["run_id"]) == ["wrong1"]
    assert what_happened(answer, answer.not_counted.iloc[0]) == "finished without a finite eval/loss"
    assert list(answer.table["n"]) == [2, 1]
    assert np.isfinite(answer.table["eval/loss mean"]).all()


def test_a_study_in_which_no_loss_is_finite_is_answered(tmp_path: Path) -> None:
    answer = answered(tmp_path, [replace(run, metrics={"eval/loss": math.nan}) for run in two_arms()])
    assert answer.sentence.startswith("No run has finished with a finite eval/loss")


def test_a_row_that_is_not_finite_is_left_out_for_both(tmp_path: Path) -> None:
    for run in two_arms():
        write_run(tmp_path, run)
    path = tmp_path / "wrong1" / "evaluation" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [rows[0] | {"loss_sum": math.inf}, *rows[1:]])
    difference = compare(load_runs(tmp_path), ["data"], "eval/loss", "min").comparisons[0].difference
    assert difference is not None
    assert difference.n_rows == 127
    assert math.isfinite(difference.high)


def test_one_arm_is_stated_with_its_interval(tmp_path: Path) -> None:
    answer = answered(tmp_path / "two", runs_of("one", {0: 0.5, 1: 0.52}))
    low, high = (f"{answer.table[f'eval/loss {side}'][0]:.3f}" for side in ("low", "high"))
    assert answer.sentence == (
        "There is one arm, one, and nothing to compare it with: its eval/loss is 0.510 nats per token "
        f"(95 % interval {low} to {high}, 2 seeds)."
    )


def test_a_failed_seed_is_named_as_the_reason_where_it_is(tmp_path: Path) -> None:
    runs = [replace(run, state="failed") if run.run_id == "clean1" else run for run in two_arms()]
    answer = answered(tmp_path, runs)
    assert answer.sentence.endswith(
        "but too few seeds are shared: only seed 0 can be compared, and one seed cannot separate arms."
    )
    third = runs_of("third", {0: 1.5, 1: 1.5})
    several = answered(tmp_path, [*runs, *third])
    assert several.sentence == (
        "procedural_clean_128 has the lowest eval/loss of 3 arms, but it has too few finished seeds in common with "
        "the others to be separated from any."
    )
    assert {pair.n_comparisons for pair in several.comparisons} == {1}  # those with one seed are not counted


@pytest.mark.parametrize("token_scale", [1, 2])
def test_all_arms_that_are_counted_alike_tell_how_far_seeds_are_apart(tmp_path: Path, token_scale: int) -> None:
    runs = [*runs_of("one", {0: 0.5, 1: 0.5}), *runs_of("two", {0: 0.6, 1: 0.6})]
    assert answered(tmp_path / "alone", runs).comparisons[0].separated
    wild = [*runs_of("up", {0: 0.5, 1: 0.9}, token_scale=token_scale)]
    wild += runs_of("down", {0: 0.9, 1: 0.5}, token_scale=token_scale)
    pairs = answered(tmp_path / "with_others", [*runs, *wild]).comparisons
    (pair,) = (pair for pair in pairs if (pair.first, pair.second) == ("one", "two"))
    # what seeds do to the others is no measure in another unit
    assert pair.verdict is (Verdict.INTERVAL_HOLDS_ZERO if token_scale == 1 else Verdict.SEPARATED)


def test_of_many_arms_each_is_compared_with_the_best(tmp_path: Path) -> None:
    count = MOST_ARMS_PAIRED + 2
    runs = [
        run for arm in range(count) for run in runs_of(f"arm{arm}", {0: 0.4 + 0.02 * arm, 1: 0.4 + 0.02 * arm}, rows=8)
    ]
    answer = answered(tmp_path, runs)
    assert len(answer.comparisons) == count - 1
    assert {pair.first for pair in answer.comparisons} == {answer.arms[0]}
    assert {pair.n_comparisons for pair in answer.comparisons} == {count * (count - 1) // 2}
    assert f"Of {count} arms each is compared with the best only, {answer.arms[0]}" in answer.notes[-1]


def test_notes_of_one_kind_are_cut(tmp_path: Path) -> None:
    runs = [FakeRun("first0", "first", 0), FakeRun("first1", "first", 1)]
    runs += [FakeRun(f"arm{arm}", f"arm{arm}", 0, mean_loss=0.6) for arm in range(9)]
    answer = answered(tmp_path, [replace(run, rows=4) for run in runs])
    assert len(answer.notes) == 6
    assert answer.notes[-1] == "and 4 more such pairs."


def test_what_was_trained_on_is_shown_and_noted(tmp_path: Path) -> None:
    counts = {
        "train": {"rows": 128, "targets_truncated": 3},
        "held_out": {"held_out": {"rows": 128, "targets_truncated": 5}},
    }
    runs = [
        replace(
            run,
            metrics={"train/rows_seen": 128 if run.data == "procedural_clean_128" else 100 + run.seed},
            counts=counts | {"wrong_answers": 60, "wrong_answers_impossible": 4 if run.run_id == "wrong1" else 0},
        )
        for run in two_arms()
    ]
    answer = answered(tmp_path, runs)
    assert list(answer.table["train/rows_seen"]) == [128, 100.5]
    wrong = "procedural_half_wrong_2048"
    assert sorted(answer.notes) == [
        "All arms: 3 of 128 training targets were cut at data.max_target_tokens.",
        "All arms: 5 of 128 held-out targets were cut, so only their beginnings are scored.",
        f"{wrong}: 0 to 4 wrong answers that were asked for could not be put in (no other answer to take); 60 were.",
        f"{wrong}: trained on 100 to 101 of the 128 training rows; the steps end before the others come.",
    ]


def test_arms_that_were_scored_on_other_rows_are_not_said_to_lack_seeds(tmp_path: Path) -> None:
    runs = [
        replace(run, sets=("cola",) if run.data == "procedural_clean_128" else ("qnli",), exact_match=False)
        for run in two_arms()
    ]
    answer = answered(tmp_path / "two", runs)
    assert answer.comparisons[0].verdict is Verdict.OTHER_ROWS
    reason = "they were scored on other held-out rows, such as those of another task"
    assert answer.sentence == (
        f"procedural_clean_128 and procedural_half_wrong_2048 cannot be compared in eval/loss: {reason}."
    )
    assert answer.notes == []
    third = runs_of("third", {0: 0.45, 1: 0.45}, sets=("cola",), exact_match=False)
    several = answered(tmp_path / "three", [*runs, *third])
    assert several.sentence == (
        "procedural_clean_128 has the lowest eval/loss of 3 arms: not separated from third; not comparable with "
        f"procedural_half_wrong_2048 ({reason})."
    )
    assert {pair.n_comparisons for pair in several.comparisons} == {1}
