"""A folder is replaced as a whole or not at all."""

from pathlib import Path

import pytest

from qlora_lab.adapters.new_folder import new_folder


def write(folder: Path, content: str) -> None:
    with new_folder(folder) as fresh:
        (fresh / "file").write_text(content)


def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write(folder, "first")
    (folder / "left over").touch()
    write(folder, "second")
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "second"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_previous_one(error: type[BaseException], tmp_path: Path) -> None:
    write(tmp_path / "x", "first")
    with pytest.raises(error), new_folder(tmp_path / "x") as fresh:
        (fresh / "file").write_text("second")
        raise error
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_failing_rename_puts_the_previous_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", "first")
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if target == tmp_path / "x" and not path.name.endswith(".previous"):
            raise OSError("disk gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="disk gone"):
        write(tmp_path / "x", "second")
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
