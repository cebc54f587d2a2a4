"""Adapters that several test files serve."""

from pathlib import Path

import pytest

from qlora_lab.serving.shared_base import SharedBase
from tests.serving.adapters import saved_adapters, shared_base


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters whose ranks, placements and scalings differ."""
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def shared(tmp_path: Path, adapters: dict[str, Path]) -> SharedBase:
    return shared_base(tmp_path, adapters)
