"""W&B's offline files give the runs that were mirrored into them, whatever state the files are in."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from wandb.cli.cli import cli

from analysis.load import load_history, load_runs
from analysis.sources import parallel, wandb_log
from analysis.sources.wandb_log import FIELDS, WandbRun, read_wandb_file
from analysis.sources.wandb_runs import read_runs, run_key
from qlora_lab.runs.mirror import RECORDS, STEP
from qlora_lab.sweep.dotted import flatten
from qlora_lab.tracking.wandb_file import BLOCK_BYTES, Damage
from tests.mirrored_runs import mirrored, standing

pytestmark = pytest.mark.usefixtures("isolated_wandb")

LONG = "word " * 20_000  # goes over several blocks


def test_a_file_says_what_was_logged(tmp_path: Path) -> None:
    lines = [{STEP: 1, "a": 0.1, "b": math.inf, "c.d": 3}, {STEP: 2, "a": -2e-300, "text": "naïve \n text"}]
    config = {"nested": {"deep": [1, None, "x"]}, "long": LONG}
    file = mirrored(tmp_path, "one", lines, standing("finished", **{"eval/loss": 1.25}), **config)
    run = read_wandb_file(file)
    assert run.run_id == "one" and run.started_at > 1.7e9 and not run.damage.count
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


Capture = pytest.CaptureFixture[str]


def inspected(file: Path, capfd: Capture) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Return history, configuration and summary as `wandb leet inspect --json` prints them, with flat keys."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["leet", "inspect", "--json", str(file)])
    printed = capfd.readouterr().out
    assert ended.value.code == 0 and printed
    history, config, summary = [], {}, {}
    for record in map(json.loads, printed.splitlines()):
        content = record[record["type"]]
        if record["type"] == "history":
            history.append(flat(content["item"]))
        elif record["type"] == "summary":
            summary |= flat(content["update"])
        elif record["type"] in ("run", "config"):
            config |= flat((content["config"] if record["type"] == "run" else content)["update"])
    return history, config, summary


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return values under keys with dots, without what W&B keeps of itself, and NaN as W&B prints it."""
    named = flatten({key: value for key, value in values.items() if key != "_wandb"})
    names = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return {key: names.get(str(value), value) for key, value in named.items() if not key.startswith("_wandb.")}


def assert_read_alike(file: Path, capfd: Capture) -> WandbRun:
    ours = read_wandb_file(file)
    history, config, summary = inspected(file, capfd)
    assert [flat(line) for line in ours.history] == history
    assert (flat(ours.config), flat(ours.summary)) == (config, summary)
    return ours


@pytest.fixture
def two_attempts(tmp_path: Path) -> list[Path]:
    """Files of one run, both over several blocks, with items of every form."""
    lines = [
        {STEP: step, "train/loss": 1 / (step + 1), "b.c": step, "d": {"e": [step, None], "f": "naïve"}}
        for step in range(1, 201)
    ]
    lines[3] |= {"nan": math.nan, "inf": math.inf, "long": LONG}
    first = mirrored(tmp_path, "one", lines, standing("interrupted"), seed=3, nested={"deep": [1, None, {"x": 2}]})
    again = [line | {"train/loss": step / 7} for step, line in enumerate(lines)][150:]
    return [first, mirrored(tmp_path, "one", again, standing("finished", **{"eval/loss": 1.25}), seed=3, long=LONG)]


def test_wandbs_own_reader_agrees_in_every_value(two_attempts: list[Path], capfd: Capture) -> None:
    first, second = (assert_read_alike(file, capfd) for file in two_attempts)
    assert (len(first.history), len(second.history)) == (200, 50) and not first.damage.count
    merged = read_runs(two_attempts)[run_key(two_attempts[0])]
    steps: dict[int, dict[str, Any]] = {}
    for line in [*first.history, *second.history]:
        line = {key: math.nan if value == math.inf else value for key, value in line.items()}
        own = {key: value for key, value in line.items() if not key.startswith("_") and key != STEP}
        steps.setdefault(line[STEP], {"step": line[STEP]}).update(own)
    assert list(map(flat, merged.history())) == [flat(steps[step]) for step in range(1, 201)]
    assert merged.row()["state"] == "finished" and merged.row()["eval/loss"] == 1.25


def test_wandbs_own_reader_agrees_on_damaged_files(two_attempts: list[Path], tmp_path: Path, capfd: Capture) -> None:
    """Both go on in the next block; a flipped bit lies in a record, in a length, or in one that has several parts."""
    data = two_attempts[0].read_bytes()
    file = tmp_path / "run-one.wandb"
    for place in (20_000, BLOCK_BYTES + 4, 2 * BLOCK_BYTES + 9_000, len(data) - 40_000):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        read = assert_read_alike(file, capfd)
        assert read.damage == Damage(1) and len(read.history) < 200 and read.summary[RECORDS], place
    for size in (len(data) - 700, 4 * BLOCK_BYTES):  # by chance the end of a record, too
        file.write_bytes(data[:size])
        assert assert_read_alike(file, capfd).damage.places == 0


def test_a_torn_file_is_read_up_to_where_it_is_torn(tmp_path: Path) -> None:
    lines = [{STEP: step, "a": step / 7} for step in range(50)]
    file = mirrored(tmp_path, "one", lines, standing("finished"), long=LONG)
    data, whole = file.read_bytes(), read_wandb_file(file).history
    torn = tmp_path / "run-one.wandb"
    counts = []
    for size in range(7, len(data), 997):
        torn.write_bytes(data[:size])
        part = read_wandb_file(torn)
        assert part.history == whole[: len(part.history)] and not part.damage.places
        counts.append(len(part.history))
    assert counts == sorted(counts) and 0 < counts[-1] <= 50


def test_damage_is_named_and_counted_and_its_run_left_out_unless_it_has_finished(tmp_path: Path) -> None:
    lines = [{STEP: step, "a": step / 7, "long": LONG[:200]} for step in range(1, 401)]
    for state in ("finished", "failed"):
        file = mirrored(tmp_path, state, lines, standing(state, **{"eval/loss": 0.5}), seed=0)
        data = file.read_bytes()
        file.write_bytes(data[:40_000] + b"?" + data[40_001:])
    garbage = tmp_path / "wandb" / "offline-run-20200101_000000-zeros" / "run-zeros.wandb"
    garbage.parent.mkdir()
    garbage.write_bytes(bytes(5_000))
    runs = load_runs(tmp_path / "wandb").set_index("run_id")
    assert runs["state"].to_dict() == {"finished": "finished", "failed": "unreadable", "zeros": "unreadable"}
    assert runs["eval/loss"]["finished"] == 0.5 and runs["seed"]["finished"] == 0
    for run_id, reason in runs["reason"].items():
        assert f"run-{run_id}.wandb is damaged in a place; what was written there is left out" in reason
    history = load_history(tmp_path / "wandb")
    assert history.attrs["damaged_lines"] == {"finished": 1, "failed": 1, "zeros": 1}
    steps = history[history["run_id"] == "finished"]["step"]
    assert 250 < len(steps) < 400 and steps.max() == 400, "what follows the damaged block is read"


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


def test_items_of_any_form_are_read_alike() -> None:
    """The quick reading of plain items is that of the protocol, whatever stands between, before and behind them."""
    draw = random.Random(0)
    values = (1, -3e-9, "a", "naïve", "x" * 130, None, True, [1, 2], {"a": 1})

    def part(content: bytes, tag: bytes) -> bytes:
        size = len(content)
        return tag + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + content

    def item(number: int) -> bytes:
        path = [f"k{number}".encode(), *([b"z"] if draw.random() < 0.2 else [])]
        keys = b"".join(part(key, draw.choice((b"\n", b"\x12")) if len(path) == 1 else b"\x12") for key in path)
        value = json.dumps(draw.choice(values), ensure_ascii=draw.random() < 0.5).encode()
        return part(keys + part(value, b"\x82\x01"), b"\n")

    plain = 0
    for _ in range(3000):
        content = b"".join(map(item, range(draw.randrange(5)))) + draw.choice((b"", part(b"\x08\x05", b"\x12")))
        assert wandb_log._items(content) == wandb_log._nested_items(content), content
        plain += wandb_log._plain_items(content) is not None
    assert 1000 < plain < 2500
