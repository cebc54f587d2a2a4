"""Fixtures shared by all tests."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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


@pytest.fixture(scope="session")
def chromium() -> Iterator["WebDriver"]:
    """Debian's Chromium, without a screen."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location, driver = paths
    # Containers give Chromium neither a sandbox nor much shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


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
