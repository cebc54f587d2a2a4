"""Benchmarks beside the ratings of a study's systems: by the names that answers were signed with."""

import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from analysis.load import load_runs
from analysis.study.systems import ScoresAndRatings, scores_and_ratings
from qlora_lab.errors import ConfigError, RunFolderError
from tests.analysis.study_folders import FakeRun, write, write_json, write_run

MMLU = "eval/mmlu/validation/0shot/hendrycks_micro"


def rated(**ratings: float) -> dict[str, Any]:
    systems = [
        {"system": name, "rating": rating, "rating_low": rating - 50, "rating_high": rating + 40}
        for name, rating in ratings.items()
    ]
    return {"systems": systems}


def evaluated(
    runs_dir: Path, run_id: str, score: float | None, system: str | None = None, task: str = "mmlu-0"
) -> None:
    folder = write_run(runs_dir, FakeRun(run_id, run_id.rstrip("01"), int(run_id[-1]), rows=1, steps=1))
    told = {"system": system or run_id, "metrics": {MMLU: score}}
    write_json(folder / "evaluations" / task / "result.json", told)


def put_together(runs_dir: Path, told: dict[str, Any]) -> ScoresAndRatings:
    runs = load_runs(runs_dir, cache=False)
    return scores_and_ratings(runs.assign(arm=runs["config.data.name"]), told)


def test_scores_and_ratings_are_joined_by_the_signed_name_and_correlated(tmp_path: Path) -> None:
    scores, ratings = (0.30, 0.26, 0.25, 0.28, 0.24), (1100.0, 1020.0, 1000.0, 900.0, 980.0)
    for number, score in enumerate(scores):
        evaluated(tmp_path, f"{'abcde'[number]}0", score, system=f"study: data={'abcde'[number]}, seed=0")
    told = rated(**{f"study: data={'abcde'[n]}, seed=0": rating for n, rating in enumerate(ratings)}, gpt=1300.0)
    found = put_together(tmp_path, told)
    assert found.table["arm"].tolist() == ["a", "b", "c", "e", "d"]
    assert found.table.iloc[0][["systems", "rating", "low", "high", MMLU]].tolist() == [1, 1100, 1050, 1140, 0.30]
    (row,) = found.correlations.to_dict("records")
    assert (row["first"], row["second"], row["arms"]) == ("rating", MMLU, 5)
    assert row["rho"] == pytest.approx(stats.spearmanr(scores, ratings).statistic)
    assert row["low"] < row["rho"] < row["high"] and 0.1 < row["p"] < 1
    assert f"rating and {MMLU} are not shown to order the 5 arms alike: Spearman's rho 0.40" in found.words
    assert "Rated, but no counted run of this study, and left out: gpt." in found.words


def test_several_seeds_are_one_arm_and_three_arms_are_too_few(tmp_path: Path) -> None:
    for run_id, score in (("a0", 0.3), ("a1", 0.5), ("b0", 0.2), ("c0", None)):
        evaluated(tmp_path, run_id, score)
    found = put_together(tmp_path, rated(a0=1000.0, a1=1100.0, b0=900.0))
    first = found.table.iloc[0]
    assert (first["arm"], first["systems"], first["rating"]) == ("a", 2, 1050)
    assert first[MMLU] == pytest.approx(0.4)
    half_width = stats.t.ppf(0.975, 1) * math.sqrt(2) * 50 / math.sqrt(2)
    assert (first["low"], first["high"]) == pytest.approx((1050 - half_width, 1050 + half_width))
    assert math.isnan(found.table.iloc[-1][MMLU]), "what a run lacks stays missing"
    assert f"Whether rating and {MMLU} order arms alike cannot be said: 2 arms have both" in found.words
    assert "Without a rating, and left out of the correlations: c." in found.words


def test_what_is_scored_or_rated_in_part_is_said(tmp_path: Path) -> None:
    for run_id, score in (("a0", 0.3), ("a1", 0.5), ("b0", None)):
        evaluated(tmp_path, run_id, score)
    notes = put_together(tmp_path, rated(a0=1000.0, b0=900.0)).notes
    assert f"Rated, but without {MMLU}, and left out of its correlation: b." in notes
    assert "Of 2 seeds of a, 1 are rated; its scores are means over all of them." in notes


def test_a_score_of_the_run_itself_is_kept_and_one_of_two_values_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, FakeRun("a0", "a", 0, rows=1, steps=1, metrics={MMLU: 0.4}))
    evaluated(tmp_path, "b0", 0.3)
    write_json(tmp_path / "a0" / "evaluations" / "probes-0" / "result.json", {"system": "a0", "metrics": {}})
    for number, (name, answers) in enumerate([("probes", 30), ("vicuna", 80)]):  # each has its own count
        metrics = {"answers": answers, MMLU: 0.4 + 1e-9 * number}
        write_json(tmp_path / "a0" / "evaluations" / name / "result.json", {"system": "a0", "metrics": metrics})
    told = rated(a0=1000.0, b0=900.0)
    assert put_together(tmp_path, told).table[MMLU].tolist() == pytest.approx([0.4, 0.3])
    write_json(tmp_path / "a0" / "evaluations" / "mmlu-1" / "result.json", {"system": "a0", "metrics": {MMLU: 0.35}})
    with pytest.raises(ConfigError, match=rf"run a0 has two values of {MMLU}, 0.4 and 0.35 \(in .*mmlu-1\)"):
        put_together(tmp_path, told)


def test_ratings_of_others_and_names_that_are_not_one_arms_are_refused(tmp_path: Path) -> None:
    evaluated(tmp_path, "a0", 0.3, system="mine")
    with pytest.raises(ConfigError, match=r"none of the 1 rated systems \(gpt\) is a run of this study.* mine$"):
        put_together(tmp_path, rated(gpt=1000.0))
    evaluated(tmp_path, "b0", 0.3, system="mine")
    with pytest.raises(ConfigError, match="runs of a and of b are both signed 'mine'"):
        put_together(tmp_path, rated(mine=1000.0))


@pytest.mark.parametrize("text", ["{", "[]", '{"system": "a0"}'])
def test_a_damaged_evaluation_is_named(tmp_path: Path, text: str) -> None:
    evaluated(tmp_path, "a0", 0.3)
    write(tmp_path / "a0" / "evaluations" / "mmlu-0" / "result.json", text)
    with pytest.raises(RunFolderError, match=r"evaluations/mmlu-0/result.json .*evaluate the run again"):
        put_together(tmp_path, rated(a0=1000.0))
