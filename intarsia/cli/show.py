"""A result as JSON for a machine, or as tables for a person.

Both come from the result's `to_dict()`, or its fields. Keys decide how a value is
written: `bytes` as a size, `seconds` as a time, `per_s` and perplexities with few digits. A list of mappings is a table
of its own. A model before and after is one short table (`_compressed`): all the rest is in its report and in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from intarsia.flags import plain
from intarsia.progress import duration
from intarsia.reporting.wording import MEASURES, change, is_measure, text_of, title_of

# In the report alone: the table has at most 15 lines.
_DETAILS = {"next_token_kl", "loops", "answer_length", "answer_perplexity", "perplexity_without_heal", "prefill_per_s"}
_GREETING = "[{'role': 'user', 'content': 'Hello'}]"


def show(result: Any, *, to: TextIO, as_json: bool) -> None:
    """Write a result to a stream: one JSON object, or tables."""
    if not as_json and hasattr(result, "summary"):  # where there is more than a person wants to read
        data = result.summary()
    else:
        data = result.to_dict() if hasattr(result, "to_dict") else plain(result)
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False), file=to, flush=True)
        return
    console = Console(file=to, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # Nobody reads columns that were broken to fit a width which a pipe does not have.
        console.width = 240
    if data.get("before") is not None and data.get("after") is not None:
        _compressed(data, console)
    else:
        _show_mapping(data, console)


def _compressed(data: Mapping[str, Any], console: Console) -> None:
    """At most 15 lines of at most 80 columns (apart from long paths): measures, time, and where everything is."""
    before, after = data["before"], data["after"]
    parts = [f"{name} {part:,.0f}" for name, part in (data.get("seconds_by_part") or {}).items() if part >= 0.5]
    given: dict[str, Any] = {"on": data.get("evaluation")}
    given["but"] = data.get("warning")
    given["time"] = duration(data["seconds"]) + (f" (seconds: {', '.join(parts)})" if parts else "")
    given |= {"model": data["out"], "report": data.get("report")}
    pipeline = f'transformers.pipeline("text-generation", "{data["out"]}")'
    if data.get("chat_template"):
        given |= {"try it": f"chat = {pipeline}", "": f"chat({_GREETING})[0]['generated_text'][-1]"}
    else:
        given["try it"] = f'{pipeline}("Hello")'
    given["hub"] = (data.get("push") or {}).get("address")
    lines = {name: text for name, text in given.items() if text is not None}

    others = [key for key in after if key.startswith("perplexity of ")]
    titles = {key: name for key, name in (MEASURES | {key: key for key in others}).items() if key not in _DETAILS}
    rows = [key for key in titles if after.get(key) is not None]
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for key in rows:
        old, new = before.get(key), after[key]
        table.add_row(*map(Text, (titles[key], text_of(key, old), text_of(key, new), change(old, new))))
    console.print(table)
    for name, text in lines.items():
        console.print(Text(f"{name:<8}", style="dim") + Text(str(text)))


def _show_mapping(data: Mapping[str, Any], console: Console, indent: str = "") -> None:
    for key, value in data.items():
        if value is None:
            continue
        if _is_table(value):
            console.print(Text(f"{indent}{title_of(key)}", style="bold"))
            console.print(_table(value))
        elif isinstance(value, Mapping) and not is_measure(value):
            console.print(Text(f"{indent}{title_of(key)}", style="bold"))
            _show_mapping(value, console, indent + "  ")
        else:
            label = Text(f"{indent}{title_of(key):<{max(1, 24 - len(indent))}} ", style="dim")
            console.print(label + Text(text_of(key, value)))


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    keys = _in_order(rows)
    for key in keys:
        numbers = all(isinstance(row.get(key), int | float | None) for row in rows)
        table.add_column(title_of(key), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text_of(key, row.get(key))) for key in keys))
    return table


def _in_order(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key of the rows, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row))
