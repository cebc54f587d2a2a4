"""The page in headless Chromium, served by the command as a study would be."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from qlora_lab.annotation.store import Store
from qlora_lab.ratings.answers import Answer
from tests.annotation.helpers import made_up, new_study

HOSTILE = "<script>document.title = 'broken'</script>\n\n<img src=x onerror=\"document.title = 'broken'\">"
WAIT_S = 60
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"  # to look at; git ignores it


@contextmanager
def served(file: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen, str]]:
    """Serve a study by the command; give the process and the first annotator's link."""
    command = [sys.executable, "-m", "qlora_lab.annotate", "--db", str(file), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().split()[1]
    finally:
        process.terminate()
        process.communicate()


def read(browser: WebDriver) -> None:
    """Let the page have been in view for a while: it ignores keys that come sooner than anybody can read."""
    browser.execute_script("openedAt = performance.now() - UNREAD_MS")


def press(browser: WebDriver, key: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(key)


def wait_for(browser: WebDriver, text: str) -> None:
    """Wait for a text; between two pages the body that was found is not there any more."""
    waiting = WebDriverWait(browser, WAIT_S, 0.02, ignored_exceptions=[StaleElementReferenceException])
    waiting.until(lambda page: text in page.find_element(By.TAG_NAME, "body").text)


def photograph(browser: WebDriver, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(SCREENSHOTS / f"annotation-{name}.png"))


def test_a_study_is_judged_by_keys_undone_and_survives_the_server(tmp_path, browser):
    file = tmp_path / "s.sqlite"
    hostile = [Answer("x", "", HOSTILE, f"{HOSTILE} {system}", f"system-{system}") for system in "ab"]
    new_study(file, "ann", answers=[*made_up(4, "ab"), *hostile]).close()
    with served(file) as (process, link):
        browser.get(link)
        for judged, key in enumerate("123"):
            wait_for(browser, f"{judged} of 5 judged")
            browser.execute_script("openedAt = Infinity")
            press(browser, key)
            assert not browser.execute_script("return sending"), "this key was meant for the page before"
            read(browser)
            press(browser, key)
        wait_for(browser, "3 of 5 judged")
        read(browser)
        press(browser, "u")
        wait_for(browser, "You chose Tie before.")
        photograph(browser, "wide")
        read(browser)
        browser.find_element(By.CSS_SELECTOR, "button.choice.first").click()
        wait_for(browser, "3 of 5 judged")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        read(browser)
        press(browser, "2")
        wait_for(browser, "Not saved yet: the server does not answer.")
    with served(file, port=int(link.split(":")[2].split("/")[0])) as (_, again):
        assert again == link
        wait_for(browser, "4 of 5 judged")
        assert "Not saved" not in browser.find_element(By.TAG_NAME, "body").text
        read(browser)
        press(browser, "1")
        wait_for(browser, "All 5 judged")
        assert "broken" not in browser.title
        policy_broken = [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]
        assert not policy_broken
    store = Store.open(file)
    votes = store.votes()
    assert [vote.judgment.verdict for vote in votes] == ["first", "second", "first", "second", "first"]
    assert all(0 <= vote.milliseconds < WAIT_S * 1000 for vote in votes)


def test_the_page_fits_a_narrow_screen_and_works_without_its_script(tmp_path, browser):
    code = (
        "```\n" + "x = 1; " * 60 + "\n```\n\n" + "longword" * 40 + "\n\n| a | b |\n|---|---|\n| " + "c" * 300 + " | d |"
    )
    answers = [Answer("1", "", "y" * 300, code, system) for system in "ab"]
    new_study(tmp_path / "s.sqlite", "ann", answers=answers).close()
    with served(tmp_path / "s.sqlite") as (_, link):
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
        )
        browser.get(link)
        first, second = (
            browser.find_element(By.CSS_SELECTOR, f"article.{place}").rect for place in ("first", "second")
        )
        photograph(browser, "narrow")
        assert first["x"] >= 0 and first["x"] + first["width"] <= 360
        assert second["y"] >= first["y"] + first["height"], "one below the other"
        page = browser.find_element(By.TAG_NAME, "html")
        assert page.get_property("scrollWidth") <= page.get_property("clientWidth"), "only code scrolls sideways"
        browser.find_element(By.CSS_SELECTOR, "button.choice.tie").click()
        wait_for(browser, "All 1 judged")
        browser.find_element(By.CSS_SELECTOR, "form.undo button").click()
        wait_for(browser, "You chose Tie before.")
