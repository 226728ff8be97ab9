"""What `intarsia bench --json` printed, as a part of a report: speed and memory, and a model with a draft."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from intarsia.disk import damage_named, read_json
from intarsia.reporting.blocks import Section, Subject, Tile, table
from intarsia.reporting.wording import model_name, text_of, title_of

_EXPECTED, _REMEDY = "what `bench --json` printed", "Measure again."
_TILES = ("acceptance", "tokens_per_pass", "speedup", "same_output")
_DRAFTED = (
    "The draft proposes tokens, and the model checks them in one pass; the acceptance is the share that it keeps. "
    "Greedy answers, with the draft and without it in turns."
)


def is_bench(path: Path) -> bool:
    """Whether a file has the rows of `bench`."""
    with suppress(OSError, ValueError):
        found = read_json(path, expected=_EXPECTED, remedy=_REMEDY) if path.suffix == ".json" else {}
        return {"rows", "repeats", "draft"} <= found.keys()
    return False


def read(path: Path) -> Subject:
    """Read the file as a subject.

    Raises:
        UserError: it is damaged.
    """
    with damage_named(path, expected=_EXPECTED, remedy=_REMEDY):
        return _subject(path, read_json(path, expected=_EXPECTED, remedy=_REMEDY))


def _subject(path: Path, found: Mapping[str, Any]) -> Subject:
    rows = [_written({**row, "model": model_name(row["model"])}) for row in found["rows"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    sections = [Section(title="Speed and memory", blocks=[table(rows, text_columns=("model",))])]
    draft = found.get("draft") or {}
    if draft:
        cells = {"draft": model_name(str(found.get("draft_model", ""))), **_written(draft)}
        blocks = [table([cells], text_columns=("draft",))]
        sections.append(Section(title="With a draft", blocks=blocks, intro=_DRAFTED))
    rounds = f"{found['threads']} threads, medians of {found['repeats']} rounds"
    return Subject(
        path=path,
        title=f"Speed: {', '.join(models)}",
        subtitle=f"On {found['device']} in {found['dtype']}, {rounds}",
        base=("", models[0]),
        tiles=[Tile(name=title_of(name), now=text_of(name, draft[name], brief=True)) for name in _TILES if draft],
        sections=sections,
    )


def _written(row: Mapping[str, Any]) -> dict[str, str]:
    return {title_of(name): text_of(name, value) for name, value in row.items()}
