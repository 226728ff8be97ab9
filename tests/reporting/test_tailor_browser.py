"""The page about a search in a real browser, without a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intarsia.reporting.page import write_report
from tests.reporting.browsing import Opened
from tests.reporting.test_tailor_run import search

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report([search(folder / "run")], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_quiet_fits_and_answers(browser: Any, report: Path, scheme: str, width: int) -> None:
    opened = Opened(browser, report, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    opened.layer("out", 2).hover()
    panel = opened.panel
    assert "Output layer 2" in panel and "math" in panel and "3 of 4 channels" in panel
    # A member has one colour, in the legend and in the picture.
    fill = "element => getComputedStyle(element).fill"
    legend = page.locator("figure", has_text="The colours of the members.")
    swatches = legend.locator("rect").evaluate_all(f"all => all.map({fill})")
    mine = page.locator('.picture .layer[data-side="out"][data-layer="3"] rect.w1').evaluate(fill)
    assert mine == swatches[1] != swatches[0]
    assert opened.said == [] and opened.asked == [report.as_uri()]
    opened.context.close()
