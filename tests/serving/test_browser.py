"""The page in headless Chromium: two adapters side by side."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

from qlora_lab.serving.app import Limits
from qlora_lab.serving.writing import Writing
from tests.serving.adapters import shared_base
from tests.serving.server import WAIT_S, Served, served

HOSTILE = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(shared_base(tmp_path_factory.mktemp("page"), adapters), Limits(max_new_tokens=450)) as found:
        yield found


def opened(browser: WebDriver, address: str) -> WebDriver:
    browser.get(address)
    wait_for(browser, "return document.body.dataset.ready === 'yes'")
    return browser


def wait_for(browser: WebDriver, script: str) -> None:
    WebDriverWait(browser, WAIT_S, 0.02).until(lambda page: page.execute_script(script))


def texts(browser: WebDriver, selector: str) -> list[str]:
    return browser.execute_script(f"return [...document.querySelectorAll('{selector}')].map((e) => e.textContent)")


def ask(browser: WebDriver, text: str) -> None:
    browser.find_element(By.ID, "text").send_keys(text, Keys.ENTER)
    wait_for(browser, "return running === null && document.querySelectorAll('.answer').length > 0")


def test_two_adapters_answer_side_by_side_and_the_conversation_is_kept(server: Served, browser: WebDriver) -> None:
    opened(browser, server.address)
    first, second = (Select(side) for side in browser.find_elements(By.TAG_NAME, "select"))
    assert (first.first_selected_option.text, second.first_selected_option.text) == ("tiny_random", "a")
    first.select_by_visible_text("b")
    temperature, longest = (browser.find_element(By.ID, name) for name in ("temperature", "max-tokens"))
    temperature.send_keys(Keys.HOME)
    longest.send_keys(Keys.CONTROL, "a", Keys.NULL, "9")
    assert texts(browser, "#shown-temperature") == ["0.0"]
    ask(browser, "hello")
    ask(browser, "again")
    jobs = server.jobs[-4:]
    assert sorted(job.adapter or "" for job in jobs) == ["a", "a", "b", "b"]
    assert {job.writing.max_tokens for job in jobs} == {9} and {job.writing.choice.temperature for job in jobs} == {0}
    for place, name in (("first", "b"), ("second", "a")):
        said = [job.writing.text for job in jobs if job.adapter == name]
        assert texts(browser, f".{place} .answer") == said
        assert len(jobs[-1].prompt) > len(jobs[0].prompt) + len(said[0]), "the turns before are asked along"
    assert texts(browser, ".first .asked") == ["hello", "again"]
    assert all("9 tokens in" in count for count in texts(browser, ".count"))
    before = texts(browser, ".answer")
    opened(browser, server.address)
    assert texts(browser, ".answer") == before and Select(browser.find_element(By.TAG_NAME, "select"))
    assert [browser.find_element(By.ID, name).get_property("value") for name in ("temperature", "max-tokens")] == [
        "0",
        "9",
    ]
    browser.find_element(By.ID, "clear").click()
    opened(browser, server.address)
    assert texts(browser, ".answer") == []


def test_an_answer_is_stopped_and_its_row_leaves(server: Served, browser: WebDriver) -> None:
    opened(browser, server.address)
    browser.execute_script("state.temperature = '0'; state.maxTokens = '450'; state.turns = []; keep(); show()")
    browser.find_element(By.ID, "text").send_keys("long", Keys.ENTER)
    wait_for(browser, "return document.querySelector('.answer')?.textContent.length > 0")
    browser.find_element(By.ID, "stop").click()
    wait_for(browser, "return running === null")
    WebDriverWait(server.engine, WAIT_S, 0.01).until(lambda engine: engine.running == 0)
    assert any("stopped" in who for who in texts(browser, ".who"))
    assert all(len(job.writing.token_ids) < 450 for job in server.jobs[-2:])


def test_texts_of_models_and_people_are_only_text(
    server: Served, browser: WebDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writing, "_decoded", lambda self, ids, last: HOSTILE if len(self.token_ids) == 1 else "")
    opened(browser, server.address)
    browser.execute_script("state.maxTokens = '2'; state.turns = []; keep(); show()")
    ask(browser, HOSTILE.replace("\n", " "))
    opened(browser, server.address)
    assert texts(browser, ".answer") == [HOSTILE] * 2 and texts(browser, ".asked") == [HOSTILE] * 2
    assert browser.title == "Chat side by side"
    assert not [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]


def test_a_token_is_asked_for_and_troubles_are_told(server: Served, browser: WebDriver) -> None:
    with served(server.shared, token="a secret of a test") as guarded:
        browser.get(guarded.address)
        wait_for(browser, "return !document.querySelector('#entry').hidden")
        browser.find_element(By.ID, "token").send_keys("a secret of a test", Keys.ENTER)
        wait_for(browser, "return document.body.dataset.ready === 'yes' && document.querySelector('#entry').hidden")
        browser.execute_script("state.maxTokens = '2000'; keep()")
        browser.find_element(By.ID, "text").send_keys("too long an answer", Keys.ENTER)
        wait_for(browser, "return running === null && !document.querySelector('#trouble').hidden")
        assert browser.find_element(By.ID, "trouble").text.startswith("The prompt has 19 tokens and max_tokens is 2000")
        assert browser.find_element(By.ID, "text").get_property("value") == "too long an answer"


def test_the_page_fits_a_narrow_screen(server: Served, browser: WebDriver) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    )
    opened(browser, server.address)
    browser.execute_script(
        "state.turns = [{asked: 'a'.repeat(300), answers: [{model: 'm', text: 'b'.repeat(900), ended: 'stop'}, null]}];"
        "show()"
    )
    background = "return getComputedStyle(document.querySelector('.answer')).backgroundColor"
    assert browser.execute_script(background) == "rgba(0, 0, 0, 0)", "it ended as a button is called"
    page = browser.find_element(By.TAG_NAME, "html")
    assert page.get_property("scrollWidth") <= 360 and page.get_property("scrollHeight") <= 740
    first, second = (browser.find_element(By.CSS_SELECTOR, f".side.{place}").rect for place in ("first", "second"))
    assert second["y"] >= first["y"] + first["height"], "one below the other"
