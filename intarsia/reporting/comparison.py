"""A comparison of methods on disk, and what is told about it: one table, and quality against size and speed.

A folder with `compare.json` (what was compared, on which texts and tasks) and `rows.jsonl` (one model a line, appended
as it is measured; the original is the row with method `dense`). A last line that a kill cut off does not count; of two
lines about the same model the later one does.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intarsia.errors import UserError
from intarsia.reporting.chart import Point, Rule, Series, chart, standalone
from intarsia.reporting.scale import Axis, layers_axis, short

SETTINGS = "compare.json"
ROWS = "rows.jsonl"
DENSE = "dense"
MEAN = "mean"

Key = tuple[str, int, str]
"""Method, layers and heal: what makes a row another model than the others."""

Measure = Mapping[str, Any]
"""A number with what is known about it: `value`, often `stderr`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a comparison.

    Attributes:
        method: the planner's name, with its changed settings where there are any; `dense` for the original.
        heal: `none` or `closed-form`.
        perplexity: by name of the text: `value`, `nll`, `stderr`, `windows`, `sha256`.
        tasks: `TaskResults.to_dict()`, or None.
        speed: the fields of `evaluation.result.Speed`, or None.
        layer_forwards, plan_seconds, heal_forwards, heal_seconds: cost; None where there was none. Of the original it
            is the cost of what its methods share.
        recipe: its recipe, relative to the folder.
        note: what is to be said of it, or why the method did not come to it (it then has no recipe).
    """

    method: str
    layers: int
    heal: str = "none"
    parameters: int | None = None
    bytes: int | None = None
    perplexity: Mapping[str, Measure] = field(default_factory=dict)
    tasks: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    layer_forwards: float | None = None
    plan_seconds: float | None = None
    heal_forwards: float | None = None
    heal_seconds: float | None = None
    recipe: str | None = None
    note: str | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        """What makes it another model than the others."""
        return self.method, self.layers, self.heal

    @property
    def name(self) -> str:
        """The method, and whether it was healed."""
        return self.method if self.heal == "none" else f"{self.method}, healed"

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second while writing."""
        return None if self.speed is None else self.speed.get("decode_tokens_per_s")

    def score(self, task: str) -> Measure | None:
        """The result of a task in its primary metric; of `mean` the mean over the tasks."""
        if self.tasks is None:
            return None
        if task == MEAN:
            mean = self.tasks.get("mean")
            if mean is None or isinstance(mean, Mapping):
                return mean
            return {"value": mean, "stderr": _stderr_of_mean([primary(score) for score in self.tasks["scores"]])}
        for score in self.tasks.get("scores", ()):
            if score.get("name") == task:
                return primary(score)
        return None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison as far as it has come.

    `texts` and `tasks` are the names of what models are judged on; `asked` are the models that it is to hold in the
    end, where the folder says so.
    """

    path: Path
    model: str
    base_sha256: str | None
    settings: Mapping[str, Any]
    eval_texts: Sequence[Mapping[str, Any]]
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    asked: tuple[Key, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the evaluation texts."""
        return tuple(text["name"] for text in self.eval_texts)

    @property
    def dense(self) -> Row | None:
        """The original model, once it has been measured."""
        return next((row for row in self.rows if row.method == DENSE), None)


def load(path: Path) -> Comparison:
    """Read a comparison.

    Raises:
        UserError: the folder holds none, or a damaged one.
    """
    facts = _settings(path / SETTINGS)
    rows = read_rows(path / ROWS)
    named = [task if isinstance(task, str) else str(task.get("name")) for task in facts.get("tasks") or ()]
    scored = [score["name"] for row in rows if row.tasks for score in row.tasks.get("scores", ()) if "name" in score]
    texts = [text for text in facts.get("eval_texts") or () if isinstance(text, Mapping) and "name" in text]
    return Comparison(
        path=path,
        model=str(facts.get("model", "")),
        base_sha256=facts.get("base_sha256"),
        settings=facts.get("settings") or {},
        eval_texts=texts,
        # What was scored is called what the results call it; before the first row there is only what was asked for.
        tasks=tuple(dict.fromkeys(scored)) or tuple(dict.fromkeys(named)),
        rows=rows,
        asked=_asked(facts.get("asked") or {}),
    )


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a `rows.jsonl`, in order; none where there is no such file yet.

    Raises:
        UserError: a whole line is no row.
    """
    if not path.exists():
        return ()
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    found: dict[tuple[str, int, str], Row] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        if line.strip():
            row = _row(line, f"{path}, line {number}")
            found[row.key] = row
    return tuple(found.values())


def primary(score: Mapping[str, Any]) -> Measure | None:
    """A task's main metric out of its `metrics`: the one it names, else acc_norm, else acc, else the first."""
    metrics = score.get("metrics") or {}
    for name in (score.get("primary"), "acc_norm", "acc", *metrics):
        if name in metrics:
            found = metrics[name]
            return found if isinstance(found, Mapping) else {"value": found}
    return None


def _stderr_of_mean(measures: Sequence[Measure | None]) -> float | None:
    """Of the mean over tasks, which are drawn independently; None where one of them has no error of its own."""
    errors = [None if measure is None else measure.get("stderr") for measure in measures]
    known = [float(error) for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.sqrt(sum(error * error for error in known)) / len(known)


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
    digits = ".1f" if abs(value) >= 10 else ".3f"
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


def curves(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of every method and heal, in the order in which they first appear; without the original."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.method != DENSE:
            found.setdefault((row.method, row.heal), []).append(row)
    return found


def figure(comparison: Comparison, *, against: str = "parameters", quality: str, title: str | None = None) -> str:
    """Quality of every model, a curve a method (dashed and hollow where it was healed), as SVG for a page.

    Args:
        against: `parameters`, `layers` or `decode_tokens_per_s`.
        quality: the name of an evaluation text (perplexity), of a task, or `mean` (of the tasks).
    """
    is_text = any(quality in row.perplexity for row in comparison.rows)

    def measure(row: Row) -> Measure | None:
        return row.perplexity.get(quality) if is_text else row.score(quality)

    def point(row: Row) -> Point | None:
        found, x = measure(row), getattr(row, against)
        if found is None or found.get("value") is None or x is None:
            return None
        said = f"{row.name}, {row.layers} layers: {found['value']:.4g}"
        return Point(x=float(x), y=found["value"], error=found.get("stderr"), title=said)

    grouped = curves(comparison.rows)
    methods = list(dict.fromkeys(method for method, _ in grouped))
    series = [
        Series(
            name=method if (method, "none") in grouped else rows[0].name,
            points=[each for each in map(point, rows) if each is not None],
            hue=methods.index(method),
            dashed=heal != "none",
            listed=heal == "none" or (method, "none") not in grouped,
        )
        for (method, heal), rows in grouped.items()
    ]
    by_depth = against == "layers"
    healed = any(heal != "none" for _, heal in grouped)
    dense = None if comparison.dense is None else measure(comparison.dense)
    rules = [] if dense is None or dense.get("value") is None else [Rule(y=dense["value"], name=DENSE)]
    label = f"perplexity, {quality}" if is_text else f"accuracy, {quality}"
    return chart(
        series,
        x=layers_axis(row.layers for row in comparison.rows if row.method != DENSE) if by_depth else _ACROSS[against],
        y=Axis(label=label, log=is_text),
        rules=rules,
        note="dashed, hollow: healed in closed form" if healed else "",
        title=title or f"{label} against {_ACROSS[against].label}",
    )


_ACROSS = {
    "parameters": Axis(label="parameters", write=short),
    "layers": layers_axis(()),
    "decode_tokens_per_s": Axis(label="tokens/s written", write=short),
}


def figure_file(comparison: Comparison, *, against: str = "parameters", quality: str) -> str:
    """`figure` as the text of an SVG file of its own."""
    return standalone(figure(comparison, against=against, quality=quality))


def _settings(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError.of(
            where=str(path),
            expected="what a comparison is about, as `intarsia compare` writes it",
            found=str(error),
            remedy="Give the folder of a comparison, or make one with `intarsia compare MODEL -o DIR`.",
        ) from error
    if not isinstance(facts, dict):
        raise UserError.of(
            where=str(path), expected="a JSON object", found=type(facts).__name__, remedy="Compare again."
        )
    return facts


def _asked(facts: Mapping[str, Any]) -> tuple[Key, ...]:
    """Every method at every depth with every heal."""
    named = (facts.get(name) or () for name in ("methods", "layers", "heal"))
    return tuple((str(method), int(layers), str(heal)) for method, layers, heal in itertools.product(*named))


def _row(line: str, where: str) -> Row:
    try:
        data = json.loads(line)
        known = {name: data[name] for name in Row.__dataclass_fields__ if data.get(name) is not None}
        row = Row(**{**known, "layers": int(data["layers"]), "method": str(data["method"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.of(
            where=where,
            expected="a row of a comparison, with at least `method` and `layers`",
            found=f"{type(error).__name__}: {error}",
            remedy="The file is damaged: delete this line, and the same command measures the model again.",
        ) from error
    return row
