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
