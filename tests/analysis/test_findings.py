"""Sentences beside the answer say what the numbers support: seeds needed, which axis matters, benchmarks together."""

from pathlib import Path

import pytest

from analysis.load import load_runs
from analysis.study.answer import Answer, compare
from analysis.study.tasks import task_scores
from tests.analysis.study_folders import FakeRun, write_run

ACC = "eval/{}/validation/0shot/acc"


def answered(
    runs_dir: Path, runs: list[FakeRun], axes: list[str], metric: str = "eval/loss", goal: str = "min"
) -> Answer:
    for run in runs:
        write_run(runs_dir, run)
    places = {run.run_id: run.axes for run in runs}
    return compare(load_runs(runs_dir, cache=False), axes, metric, goal, arms=places, draws=100)


def test_a_pair_that_is_not_separated_says_how_many_seeds_would_do(tmp_path: Path) -> None:
    runs = []
    for seed, luck in enumerate((0.0, 0.2, 0.1)):
        for data, loss in (("one", 0.5 + luck), ("two", 0.62 - 0.5 * luck)):
            runs.append(FakeRun(f"{data}{seed}", data, seed, mean_loss=loss, noise=1e-3, axes={"data": data}))
    answer = answered(tmp_path, runs, ["data", "seed"])
    assert "do not separate" in answer.sentence
    (text,) = answer.findings
    assert text.startswith("About ") and "seeds would be needed to tell a difference of the size seen between" in text
    needed = int(text.split()[1].replace(",", ""))
    assert 4 <= needed <= 300 and "times what one seed changes" in text


def planned(effect_of_data: float, seeds: int = 3) -> list[FakeRun]:
    return [
        FakeRun(
            f"{data}-{rank}-{seed}",
            data,
            seed,
            mean_loss=1 + effect_of_data * (data == "b") + 0.01 * ((7 * seed + 3 * int(rank) + (data == "b")) % 5),
            noise=1e-3,
            rows=16,
            axes={"data": data, "adapter.rank": rank},
        )
        for data in "ab"
        for rank in "48"
        for seed in range(seeds)
    ]


def test_of_several_axes_the_one_that_matters_is_named(tmp_path: Path) -> None:
    answer = answered(tmp_path, planned(0.5), ["data", "adapter.rank", "seed"])
    assert set(answer.variance["source"]) == {"data", "adapter.rank", "interactions", "seed"}
    text = answer.findings[-1]
    assert (
        text.startswith("Of the variance of eval/loss between runs go ")
        and "between runs go 100 % (98 to 100 %) with data" in text
    )
    assert text.endswith("data matters most of what was varied.")
    assert "with the seed" in text


def test_axes_that_do_nothing_are_not_named(tmp_path: Path) -> None:
    answer = answered(tmp_path, planned(0.0), ["data", "adapter.rank", "seed"])
    assert answer.findings[-1].endswith("what matters most is not separated, also not from chance.")


def test_benchmarks_are_taken_together_and_against_each_other(tmp_path: Path) -> None:
    runs = []
    for number, data in enumerate("abcde"):
        for seed in range(2):
            level = 0.3 + 0.1 * number + 0.01 * seed
            scores = {ACC.format(task): level + 0.02 * place for place, task in enumerate(("arc", "piqa", "wino"))}
            scores |= {"eval/mmlu/test/5shot/hendrycks_micro": 1 - level, "eval/mmlu/test/5shot/qlora_macro": 0.5}
            run = FakeRun(f"{data}{seed}", data, seed, mean_loss=1 - level, rows=8, metrics=scores, axes={"data": data})
            runs.append(run)
    answer = answered(tmp_path, runs, ["data", "seed"], ACC.format("arc"), "max")
    assert answer.iqm[["n", "tasks"]].values.tolist() == [[2, 4]] * 5 and answer.iqm["low"].notna().all()
    assert any(text.startswith("Over 4 benchmarks e has the highest interquartile mean") for text in answer.findings)
    against = answer.correlations.set_index(["first", "second"])["rho"]
    assert against[(ACC.format("arc"), ACC.format("piqa"))] == pytest.approx(1)
    assert against[(ACC.format("arc"), "eval/mmlu/test/5shot/hendrycks_micro")] == pytest.approx(-1)
    losses = answered(tmp_path, runs, ["data", "seed"])
    text = next(text for text in losses.findings if text.startswith("eval/loss and"))
    assert "the 5 arms alike (lower eval/loss is better): Spearman's rho -1.00" in text
    assert sum("are not shown to order the 5 arms" in text for text in answer.findings) == 3, "5 arms, 6 pairs"


def scored(tasks: list[str], n_arms: int = 4) -> list[FakeRun]:
    return [
        FakeRun(
            f"arm{arm}-{seed}",
            f"arm{arm}",
            seed,
            rows=4,
            metrics={ACC.format(task): 0.1 * arm + 0.01 * place + 0.001 * seed for place, task in enumerate(tasks)},
            axes={"data": f"arm{arm}"},
        )
        for arm in range(n_arms)
        for seed in range(2)
    ]


def test_benchmarks_that_are_left_out_are_named_with_the_reason(tmp_path: Path) -> None:
    runs = scored([f"task{number}" for number in range(10)])
    del runs[0].metrics[ACC.format("task3")], runs[1].metrics[ACC.format("task3")], runs[2].metrics[ACC.format("task5")]
    answer = answered(tmp_path, runs, ["data", "seed"])
    assert set(answer.iqm["tasks"]) == {8}
    (mean,) = (note for note in answer.notes if note.startswith("The interquartile mean"))
    assert "is over 8 of 10, since it takes those alone that every counted run was scored on" in mean
    assert mean.endswith("task3 (of 8 counted runs 2 have none), task5 (of 8 counted runs 1 have none).")
    correlated = set(answer.correlations["first"]) | set(answer.correlations["second"])
    assert correlated == {"eval/loss", *(ACC.format(f"task{number}") for number in range(7))}
    (ranks,) = (note for note in answer.notes if note.startswith("Rank correlations are of 8 metrics, eval/loss and"))
    assert ranks.endswith("Left out of 11: " + ", ".join(ACC.format(f"task{number}") for number in (7, 8, 9)) + ".")


def test_without_enough_shared_benchmarks_the_mean_is_said_to_be_missing(tmp_path: Path) -> None:
    runs = scored(["arc", "piqa", "wino"])
    del runs[-1].metrics[ACC.format("wino")]
    answer = answered(tmp_path / "lacking", runs, ["data", "seed"])
    assert answer.iqm.empty
    assert any(
        note.startswith("The interquartile mean of the benchmarks is not given, since") and note.count("wino") == 1
        for note in answer.notes
    )
    assert answered(tmp_path / "whole", scored(["arc", "piqa", "wino"]), ["data", "seed"]).notes == []


@pytest.mark.parametrize(("n_axes", "split"), [(8, True), (9, False)])
def test_axes_that_are_too_many_to_split_the_variance_by_are_named(tmp_path: Path, n_axes: int, split: bool) -> None:
    axes = {f"optim.a{number}" for number in range(n_axes)}
    values = [
        {axis: str((run >> number) % 2) for number, axis in enumerate(sorted(axes))} for run in range(1 << n_axes)
    ]
    places = [values[0], *(place for place in values if list(place.values()).count("1") == 1)]
    one_value = {"optim.alone": "7"}  # an axis that was narrowed to one value varies no more
    runs = [
        FakeRun(f"run{number}", "d", 0, mean_loss=0.5 + 0.1 * number, rows=2, axes=place | one_value)
        for number, place in enumerate(places)
    ]
    answer = answered(tmp_path, runs, [*sorted(axes), *one_value, "seed"])
    notes = [note for note in answer.notes if note.startswith("What matters most is not worked out: 9 axes vary")]
    assert (len(answer.variance) > 0) == split and len(notes) == (0 if split else 1)
    assert split or "optim.a0, optim.a1" in notes[0]


def test_each_benchmark_has_one_score() -> None:
    names = ["eval/mmlu/test/5shot/qlora_macro", "eval/mmlu/test/5shot/hendrycks_micro", "eval/arc/test/0shot/acc"]
    names += [
        "eval/arc/test/0shot/acc_norm",
        "eval/loss",
        "eval/chat/exact_match",
        "eval/glue_cola/validation/matthews",
    ]
    assert task_scores(names) == {
        "arc": "eval/arc/test/0shot/acc_norm",
        "glue_cola": "eval/glue_cola/validation/matthews",
        "mmlu": "eval/mmlu/test/5shot/hendrycks_micro",
    }


def test_interquartile_means_are_compared_seed_by_seed(tmp_path: Path) -> None:
    def ahead(folder: str, steps: tuple[float, float, float]) -> Answer:
        runs = []
        for seed, luck in enumerate((0.0, 0.1, 0.2)):  # which both arms have
            for data, gain in (("one", steps[seed]), ("two", 0.0)):
                scores = {ACC.format(task): 0.4 + luck + gain for task in ("arc", "piqa", "wino")}
                runs.append(FakeRun(f"{data}{seed}", data, seed, rows=4, metrics=scores, axes={"data": data}))
        return answered(tmp_path / folder, runs, ["data", "seed"], ACC.format("arc"), "max")

    answer = ahead("steady", (0.02, 0.021, 0.019))
    first, second = answer.iqm.to_dict("records")
    assert first["low"] < second["high"], "their own intervals overlap"
    assert second["behind"] == pytest.approx(0.02, abs=5e-4) and 0 < second["behind_low"] < second["behind_high"] < 0.03
    assert any(
        "two, is 0.020 behind on their shared seeds" in text and ": separated." in text for text in answer.findings
    )
    by_chance = ahead("by_chance", (0.06, -0.02, 0.02))
    assert any("two, is 0.0" in text and ": not separated." in text for text in by_chance.findings)
