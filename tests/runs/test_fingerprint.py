import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab import hashing
from qlora_lab.config.schema import ModelConfig, SourceConfig
from qlora_lab.errors import DataError, ModelError
from qlora_lab.runs.fingerprint import check_fingerprint, check_model_fingerprint, locate_file, source_fingerprint


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


def model_at(path: Path, source: str = "folder", **values: str) -> ModelConfig:
    return ModelConfig(source=source, path=str(path), **values)  # type: ignore[arg-type]


def write_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("a model")
    return folder


def test_a_model_folder_is_known_by_the_content_of_its_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "one")
    before = source_fingerprint(model_at(folder), tmp_path)
    assert before == source_fingerprint(model_at(write_model(tmp_path / "two")), tmp_path)  # not where it lies
    (folder / "README.md").write_text("the same model")
    assert source_fingerprint(model_at(folder), tmp_path) == before
    seen = {before}
    for name, content in (
        ("model.safetensors", "WEIGHTS"),  # as long as before
        ("config.json", '{"a": 1}'),
        ("tokenizer.json", "{}"),
        ("model-2.safetensors", "more"),
    ):
        (folder / name).write_text(content)
        seen.add(source_fingerprint(model_at(folder), tmp_path))
    assert len(seen) == 5 and None not in seen


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF one")
    before = source_fingerprint(model_at(file, "gguf"), tmp_path)
    file.write_bytes(b"GGUF two")
    assert source_fingerprint(model_at(file, "gguf"), tmp_path) not in (before, None)


def test_a_tokenizer_folder_counts_too(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    hub = {"source": "hub", "hub_id": "a/b"}
    assert source_fingerprint(ModelConfig(**hub), tmp_path) is None
    assert source_fingerprint(ModelConfig(**hub, tokenizer=str(tokenizer)), tmp_path) is not None
    assert source_fingerprint(ModelConfig(**hub, tokenizer="some/hub-id"), tmp_path) is None


def test_big_files_are_read_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    sha256 = hashing.file_sha256
    monkeypatch.setattr(hashing, "file_sha256", lambda path: (read.append(path), sha256(path))[1])
    folder = write_model(tmp_path / "model")
    for _ in range(3):
        source_fingerprint(model_at(folder), tmp_path)
    assert sorted(path.name for path in read) == ["config.json", "model.safetensors"]
    status = (folder / "config.json").stat()
    os.utime(folder / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    source_fingerprint(model_at(folder), tmp_path)
    assert [path.name for path in read[2:]] == ["config.json"]


def test_a_changed_or_missing_model_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    planned = model_at(folder, content_sha256=str(source_fingerprint(model_at(folder), tmp_path)))
    check_model_fingerprint(planned)
    check_model_fingerprint(model_at(folder))  # never resolved
    write_model(folder, b"other weights")
    with pytest.raises(ModelError, match="has changed since this run was planned"):
        check_model_fingerprint(planned)
    with pytest.raises(ModelError, match=r"model\.path does not exist"):
        source_fingerprint(model_at(tmp_path / "absent"), tmp_path)


def test_fingerprint_is_light() -> None:
    heavy = "torch transformers datasets pandas pyarrow"
    code = (
        "import sys, qlora_lab.runs.fingerprint, qlora_lab.data.templates, qlora_lab.data.procedural\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
