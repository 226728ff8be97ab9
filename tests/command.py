"""The command line, called in this process."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from intarsia.cli import main

LITTLE = ("--answers", 2, "--no-speed")
"""Options of `compress` that measure little."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """All that it printed."""
        return self.stdout + self.stderr


def invoke(*words: Any) -> Done:
    """Call `intarsia WORDS`."""
    stdout, stderr = StringIO(), StringIO()
    code: Any = 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main.run([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    return Done(exit_code=code or 0, stdout=stdout.getvalue(), stderr=stderr.getvalue())
