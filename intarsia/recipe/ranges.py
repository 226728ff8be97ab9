"""Piece indices as short text: `0-767, 900` means 0, 1, ..., 767 and 900."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from intarsia.data_file import MAX_INDEX

_RUN = re.compile(r"\s*([0-9]{1,10})\s*(?:-\s*([0-9]{1,10})\s*)?", re.ASCII)


def parse_ranges(text: str, *, most: int) -> tuple[int, ...]:
    """The indices that a text names, in its order; an empty text names none.

    Raises:
        ValueError: the text is something else, a range runs backwards, or it names more than `most` indices.
    """
    found: list[int] = []
    for run in text.split(",") if text.strip() else ():
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"{run.strip()[:40]!r} is neither a number nor a range")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first or last > MAX_INDEX:
            raise ValueError(f"the range {run.strip()[:40]!r} does not run upwards within 0..{MAX_INDEX}")
        if len(found) + last - first + 1 > most:
            raise ValueError(f"more than {most} indices")
        found.extend(range(first, last + 1))
    return tuple(found)


def format_ranges(indices: Iterable[int]) -> str:
    """The text for `parse_ranges` that names these indices in this order."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in _runs(indices))


def _runs(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    start = last = -1
    for index in indices:
        if start >= 0 and index == last + 1:
            last = index
            continue
        if start >= 0:
            yield start, last
        start = last = index
    if start >= 0:
        yield start, last
