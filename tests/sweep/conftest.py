"""Fixtures of several files here."""

from pathlib import Path

import pytest

from qlora_lab.runs.folder import RunFolder


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    folders = [RunFolder(tmp_path / f"{number:012}") for number in range(5)]
    for folder in folders:
        folder.path.mkdir()
    return folders
