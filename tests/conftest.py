"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.wandb_stand_in import KEY, WandbStandIn, wandb_stand_in

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

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


@pytest.fixture
def isolated_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting or file of this machine's user reaches W&B's client."""
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home" / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch, isolated_wandb: None) -> Iterator[WandbStandIn]:
    """A stand-in that is W&B for the test and the processes it starts."""
    with wandb_stand_in() as stand_in:
        monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
        yield stand_in


@pytest.fixture(scope="session")
def chromium() -> Iterator["WebDriver"]:
    """Debian's Chromium, without a screen."""
    from tests.chromium import headless_chromium

    with headless_chromium() as opened:
        yield opened


@pytest.fixture
def browser(chromium: "WebDriver") -> "WebDriver":
    """A tab of its own, so that no test sees what another has set."""
    chromium.switch_to.new_window("tab")
    return chromium


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
