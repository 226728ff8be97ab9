"""A page in a real browser, with everything that it says and asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Opened:
    """A page with everything that it said and asked for."""

    def __init__(self, browser: Any, report: Path, **how: Any) -> None:
        self.context = browser.new_context(**how)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())

    def layer(self, side: str, number: int) -> Any:
        return self.page.locator(f'.picture:not([hidden]) .layer[data-side="{side}"][data-layer="{number}"]')

    @property
    def panel(self) -> str:
        return str(self.page.locator(".panel").inner_text())
