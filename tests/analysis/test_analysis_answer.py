"""An answer says what its runs support, and no more."""

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.load import load_runs
from analysis.statistics.verdicts import Verdict
from analysis.study.answer import compare
from qlora_lab.errors import ConfigError
from tests.analysis.study_folders import FakeRun, answered, runs_of, two_arms, write, write_run


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
    alike = [FakeRun(arm, arm, noise=0.5, metrics={"train/steps": 0}) for arm in ("one", "two")]
    answer = answered(tmp_path / "alike", alike)
    assert answer.comparisons[0].verdict is Verdict.INTERVAL_HOLDS_ZERO
    assert answer.findings == [], "no number of seeds would tell them apart"


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
