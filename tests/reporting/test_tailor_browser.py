"""The page about a search in a real browser, without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intarsia.reporting.page import write_report
from tests.reporting.test_tailor_run import search

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report([search(folder / "run")], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_quiet_fits_and_answers(browser: Any, report: Path, scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator('.picture .layer[data-side="out"][data-layer="2"]').hover()
    panel = page.locator(".panel").inner_text()
    assert "Output layer 2" in panel and "math" in panel and "3 of 4 channels" in panel
    # A member has one colour, in the legend and in the picture.
    fill = "element => getComputedStyle(element).fill"
    legend = page.locator("figure", has_text="The colours of the members.")
    swatches = legend.locator("rect").evaluate_all(f"all => all.map({fill})")
    mine = page.locator('.picture .layer[data-side="out"][data-layer="3"] rect.w1').evaluate(fill)
    assert mine == swatches[1] != swatches[0]
    assert said == [] and asked == [report.as_uri()]
    context.close()
