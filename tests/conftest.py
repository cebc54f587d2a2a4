"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
# A shell starts background jobs with Ctrl-C ignored, and children inherit that: the runs that tests interrupt too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_slices() -> Path:
    """The folder of real data slices, where the machine has one."""
    folder = os.environ.get("QLORA_LAB_DATA")
    if not folder:
        pytest.skip("QLORA_LAB_DATA is not set: no real data slices on this machine")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of the real model, with the command that fetches it, where it is not in the cache."""
    needs = [item for item in items if item.get_closest_marker("smollm2")]
    if needs:
        from qlora_lab.errors import QloraLabError
        from qlora_lab.wheels import default_cache_dir, wheel_file

        try:
            wheel_file("smollm2_135m", default_cache_dir())
        except QloraLabError as error:
            for item in needs:
                item.add_marker(pytest.mark.skip(reason=str(error)))
