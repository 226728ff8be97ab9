"""What stands beside the rows of a comparison: the table as CSV and Markdown, figures, and the report page."""

from __future__ import annotations

from pathlib import Path

from intarsia.commands.report import REPORT
from intarsia.disk import write_whole
from intarsia.reporting.comparison import MEAN, Comparison, as_csv, as_markdown, load
from intarsia.reporting.comparison_report import figure_file
from intarsia.reporting.page import write_report

_TABLE = "table"
_FIGURE = "figure"


def write_outputs(out: Path) -> tuple[Path, ...]:
    """Write them all anew; what is missing in the comparison is missing there."""
    comparison = load(out)
    files = {f"{_TABLE}.csv": as_csv(comparison), f"{_TABLE}.md": as_markdown(comparison)}
    files |= _figures(comparison)
    for name, text in files.items():
        write_whole(out / name, text)
    write_report([out], out / REPORT)
    return tuple(out / name for name in (*files, REPORT))


def _figures(comparison: Comparison) -> dict[str, str]:
    """Quality against size, and against speed where it was measured: one figure a text, one for the tasks."""
    qualities = [*comparison.texts, *([MEAN] if any(row.tasks for row in comparison.rows) else [])]
    against = {"": "parameters", "-speed": "decode_tokens_per_s"}
    if all(row.speed is None for row in comparison.rows):
        del against["-speed"]
    return {
        f"{_FIGURE}-{_plain(quality)}{suffix}.svg": figure_file(comparison, against=kind, quality=quality)
        for quality in qualities
        for suffix, kind in against.items()
    }


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
