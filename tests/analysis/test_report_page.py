"""The page that can be asked: nothing in its data becomes part of it, and it works in Chromium without a network."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from analysis.report import interactive
from analysis.report.__main__ import main
from analysis.report.charts.explore import explore_chart
from analysis.report.charts.training import training_chart
from analysis.report.overview import overview_of, training_curves
from analysis.report.study_report import read_study
from tests.analysis.study_folders import FakeRun, two_arms, write_study
from tests.chromium import headless_chromium

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")

HOSTILE = "</script><script>document.title = 'broken'</script><!-- <script>"
WAIT_S = 120
FULL, FAINT = "0.9", "0.06"  # opacity of points that are brushed, and of the others


def grid_of_runs() -> list[FakeRun]:
    return [
        FakeRun(
            f"{data[:3]}{quant}{seed}".replace("<", "x").replace("/", "x"),
            data,
            seed,
            mean_loss=0.4 + 0.3 * (data != HOSTILE) + 0.05 * (quant == "fp4"),
            rows=8,
            axes={"data": data, "quant": quant, "seed": str(seed)},
        )
        for data, quant, seed in product((HOSTILE, "wrong"), ("nf4", "fp4"), range(2))
    ]


def with_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("interactive", "__main__"):
        monkeypatch.setattr(f"analysis.report.{module}.missing_packages", list)


def test_data_cannot_end_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_charts(monkeypatch)
    monkeypatch.setattr(interactive, "javascript", lambda: "// Vega")  # which takes seconds to make
    clean, wrong = two_arms(seeds=1)
    study = write_study(tmp_path, [replace(clean, data=HOSTILE), replace(wrong, seed=1)], question=HOSTILE)
    assert main([str(study)]) == 0
    html = (study / "report.html").read_text()
    inside = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert len(inside) == 4  # as the page was written: tables, data, Vega, charts
    charts = json.loads(inside[1])
    assert charts["explore"]["datasets"]["runs"][0]["arm"] == HOSTILE
    assert "<!--" not in html


def test_charts_hold_the_runs_that_count(tmp_path: Path) -> None:
    runs = [*grid_of_runs(), FakeRun("bad", "wrong", 2, "failed", axes={"data": "wrong", "quant": "nf4", "seed": "2"})]
    study = read_study(write_study(tmp_path, runs), tmp_path)
    chart = explore_chart(overview_of(study.answer, study.plan))
    assert chart is not None
    points = {point["id"]: point for point in chart.datasets["runs"]}
    assert set(points) == {run.run_id for run in runs} - {"bad"}
    expected = study.answer.runs.set_index("run_id")["eval/loss"]
    assert all(point["y"] == pytest.approx(expected[run_id], rel=1e-3) for run_id, point in points.items())
    best = min(points.values(), key=lambda point: point["y"])
    assert best["p2"] == 0  # the last axis is the metric
    curves = training_chart(training_curves(study.answer))
    assert curves is not None
    assert {line["group"] for line in curves.datasets["curves"]} == set(study.answer.arms)


def test_a_study_of_one_arm_and_no_cost_has_nothing_to_explore(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, two_arms(seeds=1)[:1]), tmp_path)
    assert explore_chart(overview_of(study.answer, study.plan)) is None


def test_without_its_packages_the_page_has_pictures_and_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, two_arms(seeds=4))
    assert main([str(study)]) == 0
    html = (study / "report.html").read_text()
    assert "report-data" not in html and "table.many" in html
    assert html.count("<svg") == 4
    assert "pip install 'qlora_lab[report]' (altair)" in capsys.readouterr().out


def test_the_page_in_chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_charts(monkeypatch)
    study = write_study(tmp_path, [replace(run, rows=16) for run in grid_of_runs()], question=HOSTILE)
    assert main([str(study)]) == 0
    with headless_chromium(logs=("browser", "performance")) as browser:
        browser.get((study / "report.html").as_uri())
        WebDriverWait(browser, WAIT_S).until(lambda page: attribute(page, "charts") == "drawn")
        assert not browser.get_log("browser")
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}
        assert browser.title == HOSTILE
        check_table(browser)
        check_brush(browser)
        check_legend(browser)
        check_narrow(browser)


def check_narrow(browser: WebDriver) -> None:
    """On a telephone tables and pictures scroll, and the page does not."""
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page = browser.find_element(By.TAG_NAME, "html")
    # charts are laid out anew after the page is
    WebDriverWait(browser, WAIT_S).until(lambda _: page.get_property("clientWidth") <= 360)
    WebDriverWait(browser, WAIT_S).until(lambda _: page.get_property("scrollWidth") <= page.get_property("clientWidth"))


def attribute(browser: WebDriver, name: str) -> object:
    return browser.execute_script(f"return document.documentElement.dataset.{name}")


def check_table(browser: WebDriver) -> None:
    table = browser.find_elements(By.CSS_SELECTOR, "table.many")[-1]

    def shown() -> list[str]:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        return [row.find_elements(By.TAG_NAME, "td")[3].text for row in rows if row.is_displayed()]

    button = table.find_elements(By.CSS_SELECTOR, "th button")[3]
    button.click()
    assert shown() == sorted(shown()) and len(shown()) == 8
    button.click()
    assert shown() == sorted(shown(), reverse=True)
    words = browser.find_elements(By.CSS_SELECTOR, "input[type=search]")[-1]
    words.send_keys("WRONG fp4")
    assert len(shown()) == 2
    words.clear()


def check_brush(browser: WebDriver) -> None:
    """Drag over the lower end of the axis of the metric: the runs with the best values stay, in both charts."""
    chart = browser.find_element(By.ID, "explore")
    [_, lines] = chart.find_elements(By.CSS_SELECTOR, "svg.marks g.role-scope[class*=_group] > g > path.background")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", lines)
    width, height = lines.size["width"], lines.size["height"]
    drag = ActionChains(browser, duration=20).move_to_element_with_offset(
        lines, int(width / 2) - 2, int(height / 2) - 2
    )
    drag.click_and_hold().move_by_offset(-int(width / 8), -int(height / 3)).release().perform()

    def opacities(page: WebDriver) -> list[str]:
        points = page.find_elements(By.CSS_SELECTOR, "#explore g.mark-symbol.role-mark path")
        return sorted(point.get_attribute("opacity") for point in points)

    WebDriverWait(browser, WAIT_S).until(lambda page: opacities(page) == [FAINT] * 4 + [FULL] * 4)


def check_legend(browser: WebDriver) -> None:
    bands = "#curves g.mark-area.role-mark path"
    entry = browser.find_element(By.CSS_SELECTOR, "#curves g.role-legend-entry g.role-legend-label text")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", entry)
    ActionChains(browser, duration=20).move_to_element(entry).click().perform()

    def faint(page: WebDriver) -> int:
        return sum(band.get_attribute("opacity") == "0.02" for band in page.find_elements(By.CSS_SELECTOR, bands))

    WebDriverWait(browser, WAIT_S).until(lambda page: faint(page) == 3)
