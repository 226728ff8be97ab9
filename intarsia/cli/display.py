"""Progress for the verbs that are still parsed the older way; see `intarsia.progress`."""

from __future__ import annotations

import sys
from typing import TextIO

from intarsia.progress import Job, Progress, Silent, duration

__all__ = ["display", "duration"]


def display(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """The progress display that suits where stderr goes; nothing at all when `quiet`."""
    return Silent() if quiet else Job(stream or sys.stderr)
