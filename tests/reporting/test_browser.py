"""The page in a real browser, without a window: it is quiet, draws, reacts to the pointer, and requests nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intarsia.reporting.page import write_report
from tests.reporting.browsing import Opened
from tests.reporting.runs import comparison, plan_run, row, scores, search

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = [row("dense", 6, "none", 20.0, tasks=scores(0.6)), row("come", 5, "none", 30.0, tasks=scores(0.5))]
    paths = [plan_run(folder / "run"), comparison(folder / "compare", rows)]
    write_report(paths, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_quiet_and_fits(browser: Any, report: Path, scheme: str, width: int) -> None:
    opened = Opened(browser, report, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.said == []
    assert opened.asked == [report.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    size = opened.page.locator(".picture:not([hidden]) svg").bounding_box()
    assert size["width"] > 300 and size["height"] > 150
    opened.context.close()


def test_colours_follow_the_scheme(browser: Any, report: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        opened = Opened(browser, report, color_scheme=scheme)
        script = "[...document.querySelectorAll('body, figure text')].slice(0, 2).map(e => [getComputedStyle(e)"
        found[scheme] = opened.page.evaluate(script + ".backgroundColor, getComputedStyle(e).fill])")
        opened.context.close()
    (light, light_text), (dark, dark_text) = found["light"], found["dark"]
    assert light[0] != dark[0] and light_text[1] != dark_text[1]


def test_pointing_at_a_layer_shows_what_it_is_made_of(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    before = opened.panel
    opened.page.locator(".depth input").fill("0")  # 5 layers
    assert opened.page.locator(".depth output").inner_text() == "5"
    opened.layer("out", 2).hover()
    assert "Output layer 2" in opened.panel and "stands for original layers 2 to 3" in opened.panel
    assert "1 of 4 KV groups" in opened.panel and "30 of 40 channels" in opened.panel
    assert opened.page.locator(".picture:not([hidden]) .ribbon.on").count() == 2
    assert opened.page.locator(".panel .heads i.kept").all_inner_texts() == ["0", "1", "2", "3"]
    opened.layer("in", 0).hover()
    assert "Original layer 0" in opened.panel and "0.9" in opened.panel
    opened.page.locator("h1").hover()
    assert opened.panel == before
    assert opened.said == []
    opened.context.close()


def test_it_reacts_to_keys(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    opened.layer("in", 0).focus()
    opened.page.keyboard.press("ArrowDown")
    assert "Original layer 1" in opened.panel
    opened.page.keyboard.press("Escape")
    assert "Original layer" not in opened.panel
    opened.context.close()


def test_it_reacts_to_touch(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, viewport={"width": 390, "height": 800}, has_touch=True)
    opened.layer("in", 4).tap()
    assert "Original layer 4" in opened.panel and "dropped" in opened.panel
    box = opened.page.locator(".panel").bounding_box()
    assert box["y"] + box["height"] <= 800  # in sight while the picture is
    opened.context.close()


def test_it_is_useful_without_the_script(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, java_script_enabled=False)
    assert opened.page.locator(".picture:visible svg").count() == 1
    assert "kept whole" in opened.panel
    opened.page.locator("summary", has_text="All 4 layers").click()
    assert "2 (KV groups 1, channels 30) + 3 (KV groups 3, channels 10)" in opened.page.locator("details").inner_text()
    opened.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_member_has_one_colour(browser: Any, tmp_path: Path, scheme: str) -> None:
    write_report([search(tmp_path / "run")], tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html", viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    opened.layer("out", 2).hover()
    assert "Output layer 2" in opened.panel and "math" in opened.panel and "3 of 4 channels" in opened.panel
    swatches = page.locator(".members .swatch").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    box = opened.layer("out", 3).locator("rect").nth(1)  # after the area for a finger
    assert box.evaluate("element => getComputedStyle(element).fill") == swatches[1] != swatches[0]
    assert opened.said == [] and opened.asked == [(tmp_path / "report.html").as_uri()]
    opened.context.close()
