"""Adapters that several test files serve."""

from pathlib import Path

import pytest

from qlora_lab.runs.folder import RunFolder
from qlora_lab.serving.shared_base import SharedBase
from tests.evaluation.finished_runs import finished
from tests.serving.adapters import saved_adapters, shared_base


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters whose ranks, placements and scalings differ."""
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run whose adapter changes what is answered."""
    return finished(tmp_path_factory.mktemp("runs"), "optim.learning_rate=0.05", "adapter.alpha=400")


@pytest.fixture
def shared(tmp_path: Path, adapters: dict[str, Path]) -> SharedBase:
    return shared_base(tmp_path, adapters)
