"""A cache folder of the test's own, and sizes of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def cache_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INTARSIA_CACHE", str(folder))
    return folder


@pytest.fixture
def sizes(text_file: Path) -> dict[str, Any]:
    """Calibration text and sizes that take a moment."""
    return {"calibration": str(text_file), "tokens": 256, "seq_len": 32}
