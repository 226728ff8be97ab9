"""A comparison of methods: its files, and its table.

Its folder has `compare.json` (settings, texts and tasks) and `rows.jsonl` (one model per line, appended when it is
measured; the original is the row with method `dense`). An incomplete last line is ignored; of two lines about one model
the later one counts.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intarsia.disk import damage_named, read_json
from intarsia.reporting.blocks import Table
from intarsia.reporting.wording import short
from intarsia.run_dir import Log

SETTINGS = "compare.json"
ROWS = "rows.jsonl"
DENSE = "dense"
MEAN = "mean"
ANSWERS = {
    "agreement": "agreement",
    "next-token KL": "kl",
    "answers that loop": "loops",
    "tokens of an answer": "length",
    "perplexity of answers": "perplexity",
}
"""Columns of the table, with their keys in a row's answers."""

WORDS = ("method", "heal", "note")
"""Columns of the table without numbers."""

Key = tuple[str, int, str]
"""Method, layers and heal, which identify a row."""

Measure = Mapping[str, Any]
"""A number as `value`, often with `stderr`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a comparison."""

    # The planner's name with non-default settings; `dense` for the original; the name of an existing model.
    method: str
    layers: int
    # `none`, or heal stages joined by `+`.
    heal: str = "none"
    parameters: int | None = None
    bytes: int | None = None
    # By the text's name: `value`, `nll`, `stderr`, `windows`, `sha256`.
    perplexity: Mapping[str, Measure] = field(default_factory=dict)
    # The fields of `evaluation.results.Agreement`.
    answers: Mapping[str, Any] | None = None
    # `TaskResults.to_dict()`.
    tasks: Mapping[str, Any] | None = None
    # The fields of `evaluation.results.Speed`.
    speed: Mapping[str, Any] | None = None
    # The cost; None without any. For the original, the cost shared by all methods.
    layer_forwards: float | None = None
    plan_seconds: float | None = None
    heal_forwards: float | None = None
    heal_seconds: float | None = None
    # Its recipe, relative to the folder; None if the method did not reach this depth.
    recipe: str | None = None
    recipe_sha256: str | None = None
    # Hash of the weights of an existing model.
    weights_sha256: str | None = None
    # A remark, or why the method did not reach this depth.
    note: str | None = None

    @property
    def key(self) -> Key:
        return self.method, self.layers, self.heal

    @property
    def name(self) -> str:
        """The method, and how it was healed."""
        return self.method if self.heal == "none" else f"{self.method}, {self.heal}"

    @property
    def full_name(self) -> str:
        """The method, the depth and how it was healed."""
        return f"{self.method}, {self.layers} layers" + ("" if self.heal == "none" else f", {self.heal}")

    @property
    def line(self) -> str:
        """The row on one line, for the log."""
        shown = ((name, self.measure(name)) for name in (*self.perplexity, "agreement", MEAN))
        words = [f"{name} {_written(name, measure)}" for name, measure in shown if measure is not None]
        words += [] if self.speed is None else [f"{self.speed['decode_tokens_per_s']:.1f} tokens/s"]
        return f"{self.full_name}: " + ", ".join([*words, *([self.note] if self.note else [])])

    @property
    def decode_tokens_per_s(self) -> float | None:
        return None if self.speed is None else self.speed.get("decode_tokens_per_s")

    def measure(self, name: str) -> Measure | None:
        """A result: perplexity by its text, one of `ANSWERS`, a task in its primary metric, or `mean` of the tasks."""
        if name in self.perplexity:
            return self.perplexity[name]
        if name in ANSWERS:
            found: Measure | None = (self.answers or {}).get(ANSWERS[name])
            return found
        if self.tasks is None:
            return None
        scores = {score["name"]: score["metrics"][score["primary"]] for score in self.tasks["scores"]}
        if name != MEAN:
            return scores.get(name)
        # Tasks are independent; if one has no error, the mean has none.
        errors = [measure["stderr"] for measure in scores.values()]
        stderr = None if None in errors else math.hypot(*errors) / len(errors)
        return {"value": self.tasks["mean"], "stderr": stderr}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison, finished or not."""

    path: Path
    model: str
    base_sha256: str | None
    settings: Mapping[str, Any]
    eval_texts: Sequence[Mapping[str, Any]]
    # Names of the tasks.
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    # The models of the finished comparison, if the folder records them.
    asked: tuple[Key, ...] = ()
    # The command to reproduce it.
    command: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text["name"] for text in self.eval_texts)

    @property
    def pruned(self) -> tuple[Row, ...]:
        """All rows except the original's."""
        return tuple(row for row in self.rows if row.method != DENSE)

    @property
    def dense(self) -> Row | None:
        """The original's row, if it was measured."""
        return next((row for row in self.rows if row.method == DENSE), None)

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of their colours."""
        return list(dict.fromkeys(row.method for row in self.pruned))

    @property
    def curves(self) -> dict[tuple[str, str], list[Row]]:
        """The pruned models by method and heal."""
        keys = dict.fromkeys((row.method, row.heal) for row in self.pruned)
        return {key: [row for row in self.pruned if (row.method, row.heal) == key] for key in keys}

    def of_dense(self, name: str) -> float | None:
        """A result of the original; see `Row.measure`."""
        measure = None if self.dense is None else self.dense.measure(name)
        return None if measure is None else float(measure["value"])

    @property
    def depths(self) -> list[int]:
        """The depths of the pruned models, deepest first."""
        return sorted({row.layers for row in self.pruned}, reverse=True)


def load(path: Path) -> Comparison:
    """Read a comparison.

    Raises:
        UserError: the folder holds no comparison, or a damaged one.
    """
    facts = read_json(
        path / SETTINGS,
        expected="a JSON object with the settings of a comparison, as `intarsia compare` writes it",
        remedy="Give the folder of a comparison, or make one with `intarsia compare MODEL -o DIR`.",
    )
    rows = read_rows(path / ROWS)
    asked = ((facts.get("asked") or {}).get(name, ()) for name in ("methods", "layers", "heal"))
    named = [task["name"] for task in facts.get("tasks") or ()]
    scored = [score["name"] for row in rows if row.tasks for score in row.tasks["scores"]]
    return Comparison(
        path=path,
        model=str(facts.get("model", "")),
        base_sha256=facts.get("base_sha256"),
        settings=facts.get("settings") or {},
        eval_texts=facts.get("eval_texts") or (),
        # Results have the names of the scored tasks; before the first row, use the requested names.
        tasks=tuple(dict.fromkeys(scored or named)),
        rows=rows,
        asked=tuple(itertools.product(*asked)),
        command=facts.get("command"),
    )


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a `rows.jsonl`, in order; none if there is no such file yet.

    Raises:
        UserError: a complete line is not a row.
    """
    found: dict[Key, Row] = {}
    expected = "a row of a comparison with at least `method` and `layers`"
    remedy = "Delete this line; the same command then measures the model again."
    for number, entry in Log(path).numbered():
        with damage_named(f"{path}, line {number}", expected=expected, remedy=remedy):
            row = Row(**{name: entry[name] for name in Row.__dataclass_fields__ if entry.get(name) is not None})
            found[row.key] = row
    return tuple(found.values())


def cells(comparison: Comparison) -> list[dict[str, Any]]:
    """The table: a mapping for each row, without empty values; a measure with its error is a mapping too."""
    return [_cells(row, comparison) for row in comparison.rows]


def _cells(row: Row, comparison: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = {"method": row.method, "layers": row.layers, "heal": row.heal}
    found |= {"parameters": row.parameters, "bytes": row.bytes}
    for name in (*(comparison.texts or row.perplexity), *ANSWERS, *comparison.tasks, MEAN):
        if (measure := row.measure(name)) is not None:
            value, stderr = measure["value"], measure.get("stderr")
            found[name] = value if stderr is None else {"value": value, "stderr": stderr}
    if row.speed is not None:
        found["decode tokens/s"] = row.decode_tokens_per_s
        found["prefill tokens/s"] = row.speed.get("prefill_tokens_per_s")
    for name in ("layer_forwards", "plan_seconds", "heal_forwards", "heal_seconds", "note"):
        found[name.replace("_", " ")] = getattr(row, name)
    return {name: value for name, value in found.items() if value is not None}


def written(comparison: Comparison) -> Table:
    """The table as text."""
    rows = [{name: _written(name, value) for name, value in row.items()} for row in cells(comparison)]
    return Table(rows=rows, words=WORDS)


def _written(name: str, value: Any) -> str:
    """A cell as text, with its standard error."""
    number, error = (value["value"], value.get("stderr")) if isinstance(value, Mapping) else (value, None)
    if isinstance(number, str) or name == "layers":
        return str(number)
    if name in ("parameters", "bytes"):
        return short(number)
    digits = ".2g" if abs(number) >= 1e5 and error else ".1f" if abs(number) >= 10 else ".3f"
    return f"{number:{digits}}" + (f" ± {error:.2g}" if error else "")


def as_csv(comparison: Comparison) -> str:
    """The table as CSV, with a column for each standard error after its measure."""
    rows = []
    for row in cells(comparison):
        flat: dict[str, Any] = {}
        for name, value in row.items():
            measure = value if isinstance(value, Mapping) else {"value": value}
            flat |= {name if kind == "value" else f"{name} {kind}": part for kind, part in measure.items()}
        rows.append(flat)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """The table as Markdown, each measure with its standard error."""
    table = written(comparison)
    rules = {name: "---" if name in WORDS else "---:" for name in table.columns}
    lines = [[row.get(name, "").replace("|", "\\|") for name in rules] for row in table.rows]
    heads = [name.replace("|", "\\|") for name in rules]
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, rules.values(), *lines))
