"""W&B's offline files give the runs that were mirrored into them, whatever state the files are in."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb

from analysis.load import load_history, load_runs
from analysis.sources import parallel
from analysis.sources.wandb_log import FIELDS, read_wandb_file
from analysis.sources.wandb_runs import wandb_files
from qlora_lab.runs.mirror import RECORDS, STEP

LONG = "word " * 20_000  # goes over several blocks
QUIET = {
    "console": "off",
    "silent": True,
    "disable_git": True,
    "x_save_requirements": False,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
}


@pytest.fixture(autouse=True)
def isolated_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def mirrored(folder: Path, run_id: str, lines: list[dict[str, Any]], summary: dict[str, Any], **config: Any) -> Path:
    """Write an offline run with W&B itself, and return its file."""
    before = set(wandb_files(folder / "wandb"))
    run = wandb.init(
        mode="offline", project="p", id=run_id, dir=str(folder), config=config, settings=wandb.Settings(**QUIET)
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, summary="none")
    for line in lines:
        run.log(line)
    run.summary.update(summary)
    run.finish()
    (file,) = set(wandb_files(folder / "wandb")) - before
    deadline = time.monotonic() + 240
    while not read_wandb_file(file).ended:  # `finish` does not wait for it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return file


def standing(state: str, **metrics: float) -> dict[str, Any]:
    status = {"state": state, "started_at": "2026-01-01T00:00:00", "ended_at": "2026-01-01T00:01:04", "attempt": 1}
    return {"status": state, **metrics, RECORDS: {"status": status, "environment": {"threads": 2}, "result": {"n": 7}}}


def test_a_file_says_what_was_logged(tmp_path: Path) -> None:
    lines = [{STEP: 1, "a": 0.1, "b": math.inf, "c.d": 3}, {STEP: 2, "a": -2e-300, "text": "naïve \n text"}]
    config = {"nested": {"deep": [1, None, "x"]}, "long": LONG}
    file = mirrored(tmp_path, "one", lines, standing("finished", **{"eval/loss": 1.25}), **config)
    run = read_wandb_file(file)
    assert (run.run_id, run.ended) == ("one", True) and run.started_at > 1.7e9
    assert {key: value for key, value in run.config.items() if key != "_wandb"} == config
    own = [{key: value for key, value in line.items() if not key.startswith("_")} for line in run.history]
    assert own == lines
    assert run.summary[RECORDS]["result"] == {"n": 7} and run.summary["eval/loss"] == 1.25


def test_the_numbers_of_fields_are_those_of_the_installed_protocol() -> None:
    from wandb.proto import wandb_internal_pb2 as protocol

    for message, fields in FIELDS.items():
        known = {field.name: field.number for field in getattr(protocol, message).DESCRIPTOR.fields}
        assert fields.items() <= known.items(), message
    items = [getattr(protocol, name).DESCRIPTOR for name in ("HistoryItem", "SummaryItem", "ConfigItem")]
    for name in ("key", "nested_key", "value_json"):
        assert len({item.fields_by_name[name].number for item in items}) == 1, "one reader reads all items"


def test_wandbs_own_reader_agrees(tmp_path: Path) -> None:
    lines = [{STEP: step, "loss": 1 / (step + 1), "b.c": step} for step in range(5)]
    file = mirrored(tmp_path, "one", lines, {"end": 3.5}, seed=4)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    theirs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert theirs, done.stdout
    text = json.dumps(theirs)
    ours = read_wandb_file(file)
    assert len(ours.history) == 5
    for line in ours.history:
        assert json.dumps(line["loss"]) in text
    assert '"end"' in text and ours.summary["end"] == 3.5


def test_a_torn_file_is_read_up_to_where_it_is_torn(tmp_path: Path) -> None:
    lines = [{STEP: step, "a": step / 7} for step in range(50)]
    file = mirrored(tmp_path, "one", lines, standing("finished"), long=LONG)
    data, whole = file.read_bytes(), read_wandb_file(file).history
    torn = tmp_path / "run-one.wandb"
    counts = []
    for size in range(7, len(data), 997):
        torn.write_bytes(data[:size])
        part = read_wandb_file(torn)
        assert part.history == whole[: len(part.history)] and not part.ended
        counts.append(len(part.history))
    assert counts == sorted(counts) and 0 < counts[-1] <= 50
    torn.write_bytes(data[:-300] + bytes([data[-300] ^ 1]) + data[-299:])
    assert not read_wandb_file(torn).ended, "a flipped bit is noticed"


def test_files_of_one_run_are_merged_and_the_last_one_wins(tmp_path: Path) -> None:
    first = [{STEP: step, "loss": 10.0 + step} for step in range(1, 6)]
    mirrored(tmp_path, "one", first, standing("interrupted"), seed=0)
    mirrored(tmp_path, "one", [{STEP: step, "loss": 20.0 + step} for step in range(4, 8)], standing("finished"), seed=0)
    empty = tmp_path / "wandb" / "offline-run-20200101_000000-one" / "run-one.wandb"
    empty.parent.mkdir()
    empty.write_bytes(b":W&B\xe1\xbe\x00")
    runs = load_runs(tmp_path / "wandb")
    assert runs[["run_id", "state", "seed", "n"]].values.tolist() == [["one", "finished", 0, 7]]
    history = load_history(tmp_path / "wandb", ["loss"])
    assert history["loss"].tolist() == [11.0, 12.0, 13.0, 24.0, 25.0, 26.0, 27.0]


def test_a_run_that_was_killed_at_once_is_a_row_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "wandb" / "offline-run-20200101_000000-abc" / "run-abc.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(b":W&B\xe1\xbe\x00")
    run = load_runs(tmp_path / "wandb").iloc[0]
    assert (run["run_id"], run["state"]) == ("abc", "unreadable") and "killed in its first 15 seconds" in run["reason"]


def test_several_processes_read_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = mirrored(tmp_path, "one", [{STEP: 1, "a": 0.5}], standing("finished"))
    for number in range(5):
        (tmp_path / f"run-{number}.wandb").write_bytes(file.read_bytes())
    one = load_runs(tmp_path, cache=False), load_history(tmp_path, cache=False)
    monkeypatch.setattr(parallel, "FEW", 1)
    monkeypatch.setattr(parallel, "CHUNK", 2)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda pid: {0, 1})
    two = load_runs(tmp_path, cache=False), load_history(tmp_path, cache=False)
    for ours, theirs in zip(one, two, strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert one[1]["a"].tolist() == [0.5] * 5 and one[0]["state"].tolist() == ["finished"] * 5


def test_the_same_run_from_two_places_is_one_and_the_other_place_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        mirrored(tmp_path / name, "one", [], standing("finished"))
    (run,) = load_runs([tmp_path / "a" / "wandb", tmp_path / "b" / "wandb"]).to_dict("records")
    assert f"{tmp_path}/a/wandb" in run["folder"] and run["also_in"] == f'["{tmp_path}/b/wandb/one"]'
