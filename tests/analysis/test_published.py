"""Printed numbers stand beside the arms they belong to, with their source, and nowhere else."""

from pathlib import Path

import pandas as pd
import pytest

from analysis.report.study_report import summarize_study
from analysis.report.tables import arm_table
from analysis.study.plan import plan_of
from analysis.study.published import CERTAINTY, beside_arms, published
from qlora_lab.config.command import shipped
from qlora_lab.config.schema.study import PaperConfig
from qlora_lab.errors import ConfigError, DataError
from tests.analysis.study_folders import two_arms, write, write_study

PRINTED = """table,data,model,accuracy,sure
5,clean,7B,38.8,two
5,clean,13B,47.8,two
5,wrong,7B,36.4,one
4,clean,7B,39.0,two
"""
PAPER = {
    "file": "printed.csv",
    "value": "accuracy",
    "match": {"data": "data"},
    "names": {"procedural_clean_128": "clean", "procedural_half_wrong_2048": "wrong"},
    "where": {"table": 5},
    "beside": "model",
}
ARMS = pd.DataFrame({"arm": ["c", "w", "x"], "data": ["procedural_clean_128", "procedural_half_wrong_2048", "other"]})


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sweeps" / "paper" / "printed.csv", PRINTED)
    monkeypatch.chdir(tmp_path)


def test_the_tables_of_the_project_are_read() -> None:
    table = published("mmlu_5shot_test.csv", "accuracy_percent")
    assert table["value"].between(20, 70).all() and set(table["source"]) == {"Table 4", "Table 5"}
    assert set(table["certainty"]) == {"two"}


def test_every_number_of_the_project_has_a_source_and_says_how_sure_it_is() -> None:
    numbers = {"mmlu_5shot_test": "accuracy_percent", "train_on_source": "accuracy_percent", "elo": "elo"}
    numbers |= {"mmlu_by_data_size": "mean_accuracy_percent", "perplexity_by_format": "mean_perplexity"}
    numbers |= {"read_off_figures": "rougel_at_least", "memory": "printed", "gpu_hours": "hours"}
    numbers |= {"relative_to_chatgpt": "percent_of_chatgpt", "hyperparameters": "learning_rate"}
    numbers |= {"crows_pairs": "Guanaco-65B"}
    for file in (shipped("sweeps") / "paper").glob("*.csv"):
        table = published(file.name, numbers.get(file.stem, "value"))
        assert len(table) and table["source"].str.len().min() > 5 and set(table["certainty"]) <= set(CERTAINTY)


def test_a_condition_that_is_taken_back_is_not_asked() -> None:
    joined = beside_arms(PAPER | {"where": {"table": 5, "data": "clean"}}, ARMS)
    assert joined["arm"].tolist() == ["c", "c"]
    assert len(beside_arms(PAPER | {"where": {"table": 5, "data": None}}, ARMS)) == 3


def test_numbers_are_joined_by_what_the_study_names() -> None:
    joined = beside_arms(PAPER, ARMS)
    assert joined.values.tolist() == [
        ["c", "7B", 38.8, 38.8, "Table 5", "two"],
        ["c", "13B", 47.8, 47.8, "Table 5", "two"],
        ["w", "7B", 36.4, 36.4, "Table 5", "one"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "printd.csv"}, "study.paper.file.*printed.csv"),
        ({"value": "acuracy"}, "study.paper.value.*accuracy"),
        ({"match": {"data": "dat"}}, "a column of study.paper"),
        ({"match": {"rank": "data"}}, "an axis of study.paper.match"),
        ({"where": {}}, r"has several numbers for c and 7B; tell them apart with study.paper.where"),
        ({"beside": None}, r"has several numbers for c; tell"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        beside_arms(PAPER | change, ARMS)


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "sweeps" / "paper" / "printed.csv", PRINTED.replace("36.4", "about 36"))
    with pytest.raises(DataError, match=r"printed.csv, line 4: accuracy must be a number; got 'about 36'"):
        published("printed.csv", "accuracy")


def test_a_range_that_was_read_off_a_plot_is_shown_as_one(tmp_path: Path) -> None:
    write(
        tmp_path / "sweeps" / "paper" / "plotted.csv",
        "figure,data,score_at_least,score_at_most,sure\n4,clean,64,65,one\n4,wrong,64.5,64.5,one\n",
    )
    paper = PAPER | {"file": "plotted.csv", "value": "score_at_least", "where": {}, "beside": None}
    folder = write_study(tmp_path / "runs", two_arms(), paper=paper)
    answer = summarize_study(folder, tmp_path / "runs")
    assert arm_table(answer)["paper"].tolist() == ["64 to 65", "64.5"]
    (note,) = [note for note in answer.notes if "original study" in note]
    assert "are score as far as it can be read off a plot" in note and "printed" not in note
    csv = pd.read_csv(folder / "table.csv")
    assert csv["paper at least"].tolist() == [64, 64.5] and csv["paper at most"].tolist() == [65, 64.5]
    assert "paper" not in csv


def test_a_study_file_must_say_how_arms_and_numbers_belong_together() -> None:
    with pytest.raises(ConfigError, match=r"study\.paper\.match must name a column"):
        PaperConfig(file="printed.csv")


def test_every_table_has_the_columns_and_says_what_they_are(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "runs", two_arms(), paper=PAPER)
    answer = summarize_study(folder, tmp_path / "runs")
    (note,) = [note for note in answer.notes if "original study" in note]
    assert "of that study's models and settings" in note and "Table 5; two public transcriptions agree, one" in note
    for name in ("table.md", "table.tex"):
        assert "paper: 13B" in (folder / name).read_text() and "38.8" in (folder / name).read_text()
    csv = pd.read_csv(folder / "table.csv").set_index("arm")
    assert csv.loc["procedural_half_wrong_2048", "paper 7B"] == 36.4
    assert csv["paper 7B source"].tolist() == ["Table 5"] * 2 and csv["paper 13B"].notna().sum() == 1
    assert "paper: 7B" in answer.text
    assert plan_of({"study": {"name": "s", "metric": "m", "goal": "min"}, "axes": [], "runs": []}).paper is None
