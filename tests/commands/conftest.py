"""A cache folder of the test's own, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

from intarsia.cli import main


class Done(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


Command: TypeAlias = Callable[..., Done]


@pytest.fixture(autouse=True)
def cache_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INTARSIA_CACHE", str(folder))
    return folder


@pytest.fixture
def sizes(text_file: Path) -> dict[str, Any]:
    """Calibration text and sizes that take a moment."""
    return {"calibration": str(text_file), "tokens": 256, "seq_len": 32}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `intarsia` with words."""

    def run(*words: Any) -> Done:
        capsys.readouterr()
        try:
            main.run([str(word) for word in words])
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        found = capsys.readouterr()
        return Done(code, found.out, found.err)

    return run
