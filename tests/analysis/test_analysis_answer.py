"""An answer says what its runs support, and no more."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.load import load_runs
from analysis.report.terminal import what_happened
from analysis.statistics.verdicts import Verdict
from analysis.study.answer import Answer, compare
from analysis.study.comparison import MOST_ARMS_PAIRED
from qlora_lab.errors import ConfigError
from tests.analysis.study_folders import FakeRun, two_arms, write, write_json, write_lines, write_run


def answered(
    folder: Path, runs: Sequence[FakeRun], metric: str = "eval/loss", goal: str = "min", axes: str = "data"
) -> Answer:
    for run in runs:
        write_run(folder, run)
    return compare(load_runs(folder), [axes, "seed"], metric, goal)


def test_the_embedded_study_is_answered(tmp_path: Path) -> None:
    answer = answered(tmp_path, two_arms())
    assert answer.arms == ["procedural_clean_128", "procedural_half_wrong_2048"]
    pair = answer.comparisons[0]
    assert pair.separated
    assert pair.difference is not None
    # the difference of the means in the table, which come from result.json
    means = answer.table["eval/loss mean"]
    assert pair.difference.value == pytest.approx(means[0] - means[1])
    size, low, high = (f"{-x:.3f}" for x in (pair.difference.value, pair.difference.high, pair.difference.low))
    assert answer.sentence == (
        f"procedural_clean_128 has a lower eval/loss than procedural_half_wrong_2048 by {size} nats "
        f"(95 % interval {low} to {high}, 2 seeds, 128 rows), in both seeds."
    )
    assert answer.notes == []


def test_the_table_has_one_row_an_arm_with_everything_measured(tmp_path: Path) -> None:
    answer = answered(tmp_path, two_arms())
    row = answer.table.iloc[0]
    losses = load_runs(tmp_path).set_index("run_id")["eval/loss"][["clean0", "clean1"]]
    assert row["eval/loss mean"] == pytest.approx(losses.mean())
    assert row["eval/loss std"] == pytest.approx(losses.std())
    assert row["eval/loss low"] < losses.min() < losses.max() < row["eval/loss high"]
    assert (row["n"], row["planned"], row["data"]) == (2, 2, "procedural_clean_128")
    assert row["train/tokens"] == 7217 + 85 / 2
    assert row["train/time_s"] == 45.7
    assert 0 < row["eval/exact_match"] < 1


def test_exact_match_is_compared_row_by_row_in_percentage_points(tmp_path: Path) -> None:
    runs = [replace(run, rows=512) for run in two_arms(seeds=3, gap=0.8)]
    answer = answered(tmp_path, runs, "eval/exact_match", "max")
    assert answer.arms[0] == "procedural_clean_128"
    assert "has a higher eval/exact_match than" in answer.sentence
    assert "percentage points (95 % interval" in answer.sentence
    assert answer.sentence.endswith("3 seeds, 512 rows), in every seed.")


def test_no_difference_is_said_to_be_none(tmp_path: Path) -> None:
    runs = [FakeRun(f"{data}{seed}", data, seed, noise=0.2) for data in ("one", "two") for seed in range(2)]
    answer = answered(tmp_path, runs)
    assert not answer.comparisons[0].separated
    assert answer.sentence.startswith("The runs do not separate ")
    assert answer.sentence.endswith("and the interval holds 0.")


def test_seeds_that_disagree_are_not_an_answer(tmp_path: Path) -> None:
    gaps = [0.30, 0.31, 0.30, 0.29, -0.01]
    runs = [FakeRun(f"one{seed}", "one", seed) for seed in range(len(gaps))]
    runs += [FakeRun(f"two{seed}", "two", seed, mean_loss=0.5 + gap) for seed, gap in enumerate(gaps)]
    answer = answered(tmp_path, [replace(run, noise=0.001) for run in runs])
    assert answer.comparisons[0].verdict is Verdict.SEEDS_DISAGREE
    assert answer.sentence.endswith("and the seeds disagree on the sign.")


def test_one_seed_separates_nothing(tmp_path: Path) -> None:
    answer = answered(tmp_path, two_arms(seeds=1))
    assert answer.comparisons[0].verdict is Verdict.ONE_SEED
    assert "95 % interval over rows only" in answer.sentence
    assert answer.sentence.endswith("but one seed cannot separate arms: run more seeds.")


def test_one_seed_is_enough_where_nothing_is_trained(tmp_path: Path) -> None:
    runs = [replace(run, metrics={"train/steps": 0}) for run in two_arms(seeds=1)]
    answer = answered(tmp_path, runs)
    assert answer.comparisons[0].verdict is Verdict.SEPARATED
    assert answer.sentence.endswith("in one run each, since nothing is trained.")


def test_failed_runs_are_in_the_table_and_out_of_the_mean(tmp_path: Path) -> None:
    runs = [*two_arms(), FakeRun("clean2", seed=2, state="failed"), FakeRun("other", "never_finished", 0, "failed")]
    answer = answered(tmp_path, runs)
    table = answer.table.set_index("arm")
    assert list(table.index)[-1] == "never_finished"  # last, not absent
    assert table.loc["never_finished", "n"] == 0
    assert tuple(table.loc["procedural_clean_128", ["n", "planned"]]) == (2, 3)
    assert list(answer.not_counted["run_id"]) == ["clean2", "other"]
    assert len(answer.comparisons) == 1


def test_arms_are_paired_on_the_seeds_that_finished_in_both(tmp_path: Path) -> None:
    runs = two_arms(seeds=3)
    runs[0] = replace(runs[0], state="failed")
    answer = answered(tmp_path, runs)
    difference = answer.comparisons[0].difference
    assert difference is not None
    assert difference.n_seeds == 2
    losses = load_runs(tmp_path).set_index("run_id")["eval/loss"]
    assert difference.per_seed[0] == pytest.approx(losses["clean1"] - losses["wrong1"])


def test_arms_without_a_shared_seed_cannot_be_compared(tmp_path: Path) -> None:
    answer = answered(tmp_path, [FakeRun("a", "one", 0), FakeRun("b", "two", 1)])
    assert answer.comparisons[0].verdict is Verdict.NO_SHARED_SEED
    assert "have no seed that finished in both in common" in answer.sentence


def test_nothing_finished_and_one_arm_are_said_plainly(tmp_path: Path) -> None:
    answer = answered(tmp_path / "none", [FakeRun("a", state="failed"), FakeRun("b", "two", state="running")])
    assert answer.sentence == "No run has finished with a finite eval/loss, so there is nothing to compare."
    assert len(answer.not_counted) == 2
    answer = answered(tmp_path / "one", [FakeRun("a", "one"), FakeRun("b", "two", state="failed")])
    assert answer.sentence == (
        "Only one has finished runs, so there is nothing to compare it with; the other 1 of 2 arms have none."
    )


def test_several_arms_name_the_best_and_what_it_is_not_separated_from(tmp_path: Path) -> None:
    means = {"best": 0.400, "near": 0.401, "far": 0.6}
    runs = [FakeRun(f"{name}{seed}", name, seed, mean_loss=mean) for name, mean in means.items() for seed in range(3)]
    answer = answered(tmp_path, runs)
    best, near, far = answer.arms
    assert far == "far"
    assert len(answer.comparisons) == 3
    assert answer.sentence == f"{best} has the lowest eval/loss of 3 arms, separated from far but not from {near}."


def test_several_comparisons_are_corrected(tmp_path: Path) -> None:
    runs = [
        FakeRun(f"{arm}{seed}", f"arm{arm}", seed, mean_loss=0.4 + 0.02 * arm, noise=0.1, rows=200)
        for arm in range(4)
        for seed in range(2)
    ]
    answer = answered(tmp_path, runs)
    for pair in answer.comparisons:
        assert pair.adjusted_p >= pair.p_value
        assert pair.n_comparisons == 6
    raised = [pair for pair in answer.comparisons if pair.adjusted_p > pair.p_value]
    assert len(raised) >= 4


def test_the_mean_over_sets_is_compared_as_it_is_reported(tmp_path: Path) -> None:
    runs = [replace(run, sets=("chat", "tasks"), exact_match=False) for run in two_arms()]
    answer = answered(tmp_path, runs)
    assert answer.notes == []  # the rows give what the runs report
    means = answer.table["eval/loss mean"]
    difference = answer.comparisons[0].difference
    assert difference is not None
    assert difference.value == pytest.approx(means[0] - means[1])
    assert difference.n_rows == 256
    of_one_set = compare(load_runs(tmp_path), ["data", "seed"], "eval/chat/loss", "min").comparisons[0].difference
    assert of_one_set is not None
    assert of_one_set.n_rows == 128


def test_a_metric_without_rows_is_compared_by_seed(tmp_path: Path) -> None:
    answer = answered(tmp_path, two_arms(seeds=3), "train/tokens", "min")
    difference = answer.comparisons[0].difference
    assert difference is not None
    assert (difference.n_rows, difference.value) == (0, 0)
    assert "have the same train/tokens (3 seeds)" in answer.sentence


def test_rows_that_do_not_give_the_reported_metric_are_noted(tmp_path: Path) -> None:
    for run in two_arms():
        write_run(tmp_path, run)
    path = tmp_path / "clean0" / "result.json"
    path.write_text(path.read_text().replace('"eval/loss": 0.4', '"eval/loss": 0.5'))
    answer = compare(load_runs(tmp_path), ["data"], "eval/loss", "min")
    assert [note for note in answer.notes if note.startswith("Run clean0 reports eval/loss 0.5")]


def test_a_run_without_rows_is_left_out_of_the_comparisons_with_a_note(tmp_path: Path) -> None:
    for run in two_arms():
        write_run(tmp_path, run)
    write(tmp_path / "clean1" / "evaluation" / "rows.jsonl", '{"torn')
    answer = compare(load_runs(tmp_path), ["data"], "eval/loss", "min")
    assert "Run clean1 is left out of the comparisons" in answer.notes[0]
    assert "line 1, is not a row" in answer.notes[0]
    assert answer.comparisons[0].verdict is Verdict.ONE_SEED
    assert answer.table["n"][0] == 2  # its reported loss counts in the mean


def test_only_shared_rows_are_compared_and_that_is_noted(tmp_path: Path) -> None:
    runs = two_arms()
    runs[3] = replace(runs[3], rows=100)
    answer = answered(tmp_path, runs)
    difference = answer.comparisons[0].difference
    assert difference is not None
    assert difference.n_rows == 100
    assert "compared on the 100 rows that all their runs have" in answer.notes[-1]


def test_bad_questions_are_refused(tmp_path: Path) -> None:
    runs = two_arms()
    for run in runs:
        write_run(tmp_path, run)
    frame = load_runs(tmp_path)
    with pytest.raises(ConfigError, match=r"study\.metric must be one of .*; got 'eval/los'; did you mean 'eval/loss'"):
        compare(frame, ["data"], "eval/los", "min")
    with pytest.raises(ConfigError, match=r"study\.goal must be one of min, max; got 'minimum'"):
        compare(frame, ["data"], "eval/loss", "minimum")
    with pytest.raises(ConfigError, match=r"has several runs with seed 0 .*add the configuration key"):
        compare(frame, ["quant.format"], "eval/loss", "min")
    with pytest.raises(ConfigError, match="run clean0 has no place on the axes data"):
        compare(frame, ["data"], "eval/loss", "min", arms={"clean1": {"data": "x"}})


def test_the_plan_decides_the_arms(tmp_path: Path) -> None:
    for run in two_arms():
        write_run(tmp_path, run)
    places = {f"{arm}{seed}": {"data": arm, "seed": str(seed)} for arm in ("clean", "wrong") for seed in range(2)}
    answer = compare(load_runs(tmp_path), ["data", "seed"], "eval/loss", "min", arms=places)
    assert answer.arms == ["clean", "wrong"]


def runs_of(arm: str, losses: dict[int, float], **fields: Any) -> list[FakeRun]:
    """Return an arm's runs, one a seed, that hardly differ but in what is asked for."""
    return [FakeRun(f"{arm}{seed}", arm, seed, mean_loss=loss, noise=0.001, **fields) for seed, loss in losses.items()]


def test_an_arm_that_leads_only_by_a_seed_of_its_own_does_not_win(tmp_path: Path) -> None:
    one = runs_of("one", {0: 0.3, 1: 0.62, 2: 0.62})
    two = runs_of("two", {1: 0.6, 2: 0.6})
    answer = answered(tmp_path, [*one, *two])
    assert answer.arms == ["one", "two"]  # by the means over all finished seeds
    assert answer.sentence.startswith("one has a higher eval/loss than two by 0.0")
    assert "in both shared seeds; the means in the table, over all finished seeds, are the other way" in answer.sentence
    assert answer.notes == [
        "one and two are compared on seeds 1, 2 only; their means in the table are over 0, 1, 2 and over 1, 2."
    ]


def test_the_best_of_several_arms_has_not_beaten_one_that_was_better_on_the_shared_seeds(tmp_path: Path) -> None:
    runs = [
        *runs_of("best", {0: 0.3, 1: 0.62, 2: 0.62}),
        *runs_of("better", {1: 0.6, 2: 0.6}),
        *runs_of("last", {0: 0.6, 1: 0.92, 2: 0.92}),
    ]
    answer = answered(tmp_path / "three", runs)
    assert answer.arms == ["best", "better", "last"]
    assert all(pair.separated for pair in answer.comparisons)
    assert answer.sentence == (
        "best has the lowest eval/loss of 3 arms: separated from last; but worse than better on the seeds that both "
        "finished."
    )
    assert len(answer.notes) == 2  # the note on the pair, and on better and last


def test_the_direction_follows_the_goal(tmp_path: Path) -> None:
    runs = [*runs_of("one", {0: 0.9, 1: 0.3, 2: 0.3}), *runs_of("two", {1: 0.4, 2: 0.4})]
    answer = answered(tmp_path, runs, goal="max")
    assert answer.arms == ["one", "two"]
    assert answer.sentence.startswith("one has a lower eval/loss than two by")
    assert answer.sentence.endswith("are the other way round.")


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
