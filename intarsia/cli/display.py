"""Progress for the verbs that are still parsed the older way; see `intarsia.progress`."""

from __future__ import annotations

import sys
from typing import TextIO

from intarsia import progress
from intarsia.progress import duration

__all__ = ["display", "duration"]


def display(*, quiet: bool = False, stream: TextIO | None = None) -> progress.Progress:
    """The progress display that suits where stderr goes, for all work of this process; nothing when `quiet`."""
    found = progress.Silent() if quiet else progress.Job(stream or sys.stderr)
    progress._CURRENT.set(found)
    return found
