import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.config.schema import SourceConfig
from qlora_lab.runs.fingerprint import check_fingerprint, locate_file, source_fingerprint
from qlora_lab.errors import DataError


def file_source(path: str) -> SourceConfig:
    return SourceConfig(kind="file", template="alpaca", path=path)


def test_fingerprint_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    content = b"x" * 3_000_000  # more than one chunk
    (tmp_path / "rows.jsonl").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert source_fingerprint(file_source("rows.jsonl"), tmp_path) == expected
    (tmp_path / "rows.jsonl").write_bytes(content + b"y")
    assert source_fingerprint(file_source("rows.jsonl"), tmp_path) != expected


def test_sources_that_are_no_local_file_have_no_fingerprint(tmp_path: Path) -> None:
    assert source_fingerprint(SourceConfig(kind="procedural", template="procedural"), tmp_path) is None
    assert source_fingerprint(SourceConfig(kind="hub", template="alpaca", hub_id="a/b"), tmp_path) is None


def test_relative_path_means_the_data_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir, working_dir = tmp_path / "data", tmp_path / "work"
    for folder in (data_dir, working_dir):
        folder.mkdir()
    monkeypatch.chdir(working_dir)
    (working_dir / "rows.jsonl").touch()
    assert locate_file("rows.jsonl", data_dir) == working_dir / "rows.jsonl"
    (data_dir / "rows.jsonl").touch()
    assert locate_file("rows.jsonl", data_dir) == data_dir / "rows.jsonl"


def test_missing_file_names_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        locate_file("gone.jsonl", tmp_path / "data")
    assert str(tmp_path / "data" / "gone.jsonl") in str(error.value)
    assert str(tmp_path / "gone.jsonl") in str(error.value)
    with pytest.raises(DataError, match="is a folder"):
        locate_file(str(tmp_path), tmp_path)


def test_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    check_fingerprint(path, None)
    check_fingerprint(path, source_fingerprint(file_source(str(path)), tmp_path))
    with pytest.raises(DataError, match="has changed since this run was planned"):
        check_fingerprint(path, "0" * 64)


def test_fingerprint_is_light() -> None:
    heavy = "torch transformers datasets pandas pyarrow"
    code = (
        "import sys, qlora_lab.runs.fingerprint, qlora_lab.data.templates, qlora_lab.data.procedural\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
