"""The table of a comparison: its cells, as CSV, and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from intarsia.reporting.comparison import MEAN, Comparison, Row
from intarsia.reporting.scale import short


def columns(comparison: Comparison) -> list[str]:
    """The columns of the table that at least one row has something in."""
    return list(dict.fromkeys(key for row in comparison.rows for key in _cells(row, comparison)))


def cells(comparison: Comparison) -> list[dict[str, Any]]:
    """The table: a mapping a row, numbers as numbers. What has a standard error has a column for it behind it."""
    return [_cells(row, comparison) for row in comparison.rows]


def as_csv(comparison: Comparison) -> str:
    """The whole table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(comparison), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(comparison))
    return text.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """The table as Markdown, standard errors beside what they belong to."""
    names = [name for name in columns(comparison) if not name.endswith(" stderr")]
    lines = [
        "| " + " | ".join(name.replace("|", "\\|") for name in names) + " |",
        "|" + "|".join("---" if name in ("method", "heal", "note") else "---:" for name in names) + "|",
    ]
    for row in cells(comparison):
        written = [written_cell(name, row) for name in names]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in written) + " |")
    return "\n".join(lines) + "\n"


def written_cell(name: str, row: Mapping[str, Any]) -> str:
    """A cell of the table as a person reads it, with its standard error."""
    value, error = row.get(name), row.get(f"{name} stderr")
    if value is None or isinstance(value, str):
        return value or ""
    if name == "layers":
        return str(value)
    if name in ("parameters", "bytes"):
        return short(value)
    digits = ".2g" if abs(value) >= 1e5 and error else ".1f" if abs(value) >= 10 else ".3f"
    return f"{value:{digits}}" + (f" ± {error:.2g}" if error else "")


def _cells(row: Row, comparison: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = {"method": row.method, "layers": row.layers, "heal": row.heal}
    found |= {"parameters": row.parameters, "bytes": row.bytes}
    measures = {text: row.perplexity.get(text) for text in comparison.texts or tuple(row.perplexity)}
    if row.tasks is not None:
        measures |= {task: row.score(task) for task in (*comparison.tasks, MEAN)}
    for name, measure in measures.items():
        if measure is not None and measure.get("value") is not None:
            found[name] = measure["value"]
            found[f"{name} stderr"] = measure.get("stderr")
    if row.speed is not None:
        found["decode tokens/s"] = row.decode_tokens_per_s
        found["prefill tokens/s"] = row.speed.get("prefill_tokens_per_s")
    for name in ("layer_forwards", "plan_seconds", "heal_forwards", "heal_seconds", "note"):
        found[name.replace("_", " ")] = getattr(row, name)
    return {name: value for name, value in found.items() if value is not None}
