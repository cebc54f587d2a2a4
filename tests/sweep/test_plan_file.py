"""The plan's file: what was planned comes back as it was, once for what runs share, and nothing changes it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lab.config.schema import EvaluationSetConfig, RunConfig
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.runs.folder import RunFolder
from qlora_lab.sweep import plan_file
from qlora_lab.sweep.plan import make_plan
from qlora_lab.sweep.plan_file import check_code, read_plan_file, write_plan_file
from qlora_lab.sweep.run_folders import create_run_folders
from tests.helpers import tiny


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[plan_file.Row]:
    runs_dir = tmp_path_factory.mktemp("runs")
    config = tiny(runs_dir, "launcher=slurm", "+launcher.slurm.extra={nice:5,mail:[1,null]}")
    sets = {"chat": EvaluationSetConfig(kind="procedural", template="procedural")}
    with_set = replace(config, evaluation=replace(config.evaluation, sets=sets))
    plan = make_plan(
        "study",
        [
            ({"seed": str(seed), "x": "a,b 'c'"}, replace(each, seed=seed))
            for each in (config, with_set)
            for seed in range(3)
        ],
    )
    return [(run.run_id, run.axes, run.config) for run in plan.runs]


def test_what_was_planned_comes_back_as_it_was(rows: list[plan_file.Row], tmp_path: Path) -> None:
    path = write_plan_file(tmp_path, "study", rows)
    found = read_plan_file(path)
    assert found.rows == rows and found.study == "study"
    assert isinstance(found.rows[0][2], RunConfig)
    some = read_plan_file(path, [rows[1][0], rows[4][0]])
    assert some.rows == [rows[1], rows[4]]


def test_what_runs_share_is_written_and_read_once(rows: list[plan_file.Row], tmp_path: Path) -> None:
    path = write_plan_file(tmp_path, "study", rows)
    groups = json.loads(path.read_text())["groups"]
    assert {group: len(values) for group, values in groups.items() if len(values) > 1} == {"evaluation": 2, "seed": 3}
    found = [config for _, _, config in read_plan_file(path).rows]
    assert found[0].model is found[5].model and found[0].evaluation is not found[5].evaluation


def test_new_folders_are_those_that_one_run_alone_gets(rows: list[plan_file.Row], tmp_path: Path) -> None:
    create_run_folders(tmp_path / "all", [(run_id, config) for run_id, _, config in rows])
    for run_id, _, config in rows:
        alone = RunFolder.create(tmp_path / "alone", run_id, config)
        both = [folder / run_id / "config.yaml" for folder in (tmp_path / "all", tmp_path / "alone")]
        assert both[0].read_text() == both[1].read_text()
        assert RunFolder(both[0].parent).config() == config == alone.config()


def test_a_plan_is_never_written_over(rows: list[plan_file.Row], tmp_path: Path) -> None:
    path = write_plan_file(tmp_path, "study", rows)
    before = path.stat().st_mtime_ns
    assert write_plan_file(tmp_path, "study", rows) == path and path.stat().st_mtime_ns == before
    elsewhere = [(i, axes, replace(c, tracking=replace(c.tracking, project="other"))) for i, axes, c in rows]
    other = write_plan_file(tmp_path, "study", elsewhere)
    assert other != path and path.stat().st_mtime_ns == before


def test_a_file_that_is_not_what_was_planned_is_refused(rows: list[plan_file.Row], tmp_path: Path) -> None:
    path = write_plan_file(tmp_path, "study", rows)
    with pytest.raises(RunFolderError, match=r"plan-.*\.json plans no run 0123; plan the study again"):
        read_plan_file(path, [rows[0][0], "0123"])
    path.write_text(path.read_text().replace('"rank": 8', '"rank": 9').replace('"seed"', '"seed" '))
    with pytest.raises(RunFolderError, match="is not what was planned"):
        read_plan_file(path)
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_plan_file(tmp_path / "plan-0.json")


def test_a_plan_of_older_code_can_be_looked_at(rows: list[plan_file.Row], tmp_path: Path) -> None:
    path = write_plan_file(tmp_path, "study", rows)
    for text, readable in (
        (path.read_text().replace('"rslora": false, ', ""), True),  # a key that came later
        (path.read_text().replace('"rslora"', '"rslore"'), False),
    ):
        older = tmp_path / f"plan-{plan_file._hash(text)}.json"
        older.write_text(text)
        if readable:
            assert read_plan_file(older).rows == rows
        else:
            with pytest.raises(RunFolderError, match="was planned with code that this one cannot read"):
                read_plan_file(older)


def test_other_code_than_was_planned_with_is_refused(
    rows: list[plan_file.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_plan_file(write_plan_file(tmp_path, "study", rows))
    check_code(record)
    monkeypatch.setattr(plan_file, "code_sha256", lambda: "0" * 64)
    monkeypatch.setattr(plan_file, "code_commit", lambda: "abc+changes")
    with pytest.raises(ConfigError, match="has changed since study study was planned") as refused:
        check_code(replace(record, commit="123"))
    assert "(at commit 123, now abc+changes)" in str(refused.value)
