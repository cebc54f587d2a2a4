"""What was read once is not read again, and nobody can tell but by the time it takes."""

from pathlib import Path

import pandas as pd
import pytest

from analysis.load import load_history, load_runs
from analysis.sources import run_folders
from tests.analysis.study_folders import FakeRun, two_arms, write_run, write_study


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(left, right, check_exact=True, check_like=True)  # columns in any order


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the run folders that are read from now on."""
    names: list[str] = []
    original = run_folders.load_run

    def noted(folder: Path) -> dict[str, object]:
        names.append(folder.name)
        return original(folder)

    monkeypatch.setattr(run_folders, "load_run", noted)
    return names


def test_only_new_and_changed_runs_are_read(tmp_path: Path, read: list[str]) -> None:
    runs_dir, cache = tmp_path / "runs", tmp_path / "cache"
    write_study(runs_dir, two_arms())
    write_run(runs_dir, FakeRun("crashed", state="failed"))
    plain = load_runs(runs_dir, cache=False)
    read.clear()
    same(load_runs(runs_dir, cache=cache), plain)
    assert len(read) == 5
    same(load_runs(runs_dir, cache=cache), plain)
    assert len(read) == 5, "nothing has changed"
    write_run(runs_dir, FakeRun("another", counts={"train": {"rows": 7, "said": "naïve"}}, exact_match=False))
    write_run(runs_dir, FakeRun("crashed", seed=3))
    (runs_dir / "wrong0" / "result.json").unlink()
    for frame in (load_runs(runs_dir, cache=cache), load_runs(runs_dir, cache=cache)):
        assert sorted(read[5:8]) == ["another", "crashed", "wrong0"] and len(read) == 8
        state = dict(zip(frame["run_id"], frame["state"], strict=True))
        assert (state["crashed"], state["wrong0"]) == ("finished", "unreadable")
    same(load_runs(runs_dir, cache=cache), load_runs(runs_dir, cache=False))


def test_a_run_that_is_gone_is_gone(tmp_path: Path) -> None:
    runs_dir, cache = tmp_path / "runs", tmp_path / "cache"
    folders = [write_run(runs_dir, FakeRun(name)) for name in ("a", "b")]
    assert len(load_runs(runs_dir, cache=cache)) == 2
    for file in sorted(folders[0].rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert load_runs(runs_dir, cache=cache)["run_id"].tolist() == ["b"]


def test_a_folder_that_is_named_twice_is_one_run_now_and_later(tmp_path: Path) -> None:
    runs_dir, cache = tmp_path / "runs", tmp_path / "cache"
    for name in ("a", "b"):
        write_run(runs_dir, FakeRun(name))
    for load_frame in (load_runs, load_history):
        for source in ([runs_dir, runs_dir / "a"], runs_dir):
            same(load_frame(source, cache=cache), load_frame(runs_dir, cache=False))


def test_a_run_of_two_places_is_read_from_one_of_them_and_the_other_is_named(tmp_path: Path) -> None:
    for place, loss in (("here", 0.25), ("there", 0.75)):
        write_run(tmp_path / place, FakeRun("a", metrics={"eval/loss": loss}))
    (tmp_path / "here" / "a").rename(tmp_path / "here" / "a copy")
    sources = [tmp_path / "here", tmp_path / "there"]
    for cache in (False, tmp_path / "cache", tmp_path / "cache"):
        (run,) = load_runs(sources, cache=cache).to_dict("records")
        assert run["eval/loss"] == 0.75, "that of the folder which is named by the id"
        assert run["also_in"] == f'["{tmp_path}/here/a copy"]'
        assert len(load_history(sources, cache=cache)) == 30
    write_run(tmp_path / "a third", FakeRun("a", metrics={"eval/loss": 0.5}))
    (run,) = load_runs([tmp_path / "a third", *sources]).to_dict("records")
    assert run["eval/loss"] == 0.5, "of several the first"


def test_part_of_a_folder_is_what_it_would_be_alone_and_the_rest_is_not_forgotten(
    tmp_path: Path, read: list[str]
) -> None:
    runs_dir, cache = tmp_path / "runs", tmp_path / "cache"
    odd = {"optim": {"learning_rate": "auto", "steps": 3}, "trainer": {"flag": True}}
    write_run(runs_dir, FakeRun("odd", config=odd, metrics={"eval/more": 1.0}))
    write_run(runs_dir, FakeRun("crashed", state="failed"))
    write_run(runs_dir, FakeRun("waits", state="not_started"))
    write_run(runs_dir, FakeRun("plain", config={"optim": {"steps": 2.5}, "trainer": {"flag": None}}))
    load_runs(runs_dir, cache=cache)
    read.clear()
    for names in (["plain"], ["waits"], ["crashed", "plain"], ["odd"], ["plain", "odd"]):
        folders = [runs_dir / name for name in names]
        kept, alone = load_runs(folders, cache=cache), load_runs(folders, cache=False)
        same(kept, alone)
        assert list(kept.columns) == list(alone.columns)
        read[:] = []
    load_runs(runs_dir, cache=cache)
    assert read == []


def test_a_run_without_a_line_yet_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_dir, cache = tmp_path / "runs", tmp_path / "cache"
    (write_run(runs_dir, FakeRun("a", state="running")) / "metrics.jsonl").write_text("")
    assert load_history(runs_dir, cache=cache).empty
    monkeypatch.setattr(run_folders, "read_steps", None)
    assert load_history(runs_dir, cache=cache).empty


def test_torn_lines_of_curves_are_counted_now_and_later(tmp_path: Path) -> None:
    with (write_run(tmp_path / "runs", FakeRun("a")) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "train/l')
    for _ in range(2):
        assert load_history(tmp_path / "runs", cache=tmp_path / "cache").attrs["damaged_lines"] == {"a": 1}


def test_curves_are_kept_as_well(tmp_path: Path) -> None:
    runs_dir, cache = tmp_path / "runs", tmp_path / "cache"
    write_study(runs_dir, two_arms())
    plain = load_history(runs_dir, cache=False)
    for _ in range(2):
        same(load_history(runs_dir, cache=cache), plain)
    with (runs_dir / "clean0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "time_s": 50.0, "train/loss": 0.25, "train/new": 3}\n')
    longer = load_history(runs_dir, cache=cache)
    same(longer, load_history(runs_dir, cache=False))
    assert len(longer) == len(plain) + 1 and longer["train/new"].notna().sum() == 1
    assert list(load_history(runs_dir, ["train/loss"], cache=cache).columns) == [
        "run_id",
        "step",
        "time_s",
        "train/loss",
    ]


def test_a_damaged_cache_is_read_over(tmp_path: Path, read: list[str]) -> None:
    runs_dir, cache = tmp_path / "runs", tmp_path / "cache"
    write_run(runs_dir, FakeRun("a"))
    load_runs(runs_dir, cache=cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert load_runs(runs_dir, cache=cache)["run_id"].tolist() == ["a"]
    assert read == ["a", "a"]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs", FakeRun("a"))
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load_runs(tmp_path / "runs", cache=tmp_path / "cache")) == 1
    assert "not kept for the next time" in capsys.readouterr().err
