"""A comparison of methods on disk, and its table.

A folder with `compare.json` (the settings, texts and tasks) and `rows.jsonl` (one model a line, appended as it is
measured; the original is the row with method `dense`). An incomplete last line is ignored; of two lines about the same
model the later one counts.
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

from intarsia.disk import read_json
from intarsia.errors import UserError
from intarsia.reporting.wording import short

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
"""Columns of the table, and what they are in a row's answers."""

Key = tuple[str, int, str]
"""Method, layers and heal, which identify a row."""

Measure = Mapping[str, Any]
"""A number as `value`, often with `stderr`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a comparison."""

    # The planner's name, with its changed settings where there are any; `dense` for the original; the name of a model
    # that existed already.
    method: str
    layers: int
    # `none` or `closed-form`.
    heal: str = "none"
    parameters: int | None = None
    bytes: int | None = None
    # By name of the text: `value`, `nll`, `stderr`, `windows`, `sha256`.
    perplexity: Mapping[str, Measure] = field(default_factory=dict)
    # The fields of `evaluation.results.Agreement`.
    answers: Mapping[str, Any] | None = None
    # `TaskResults.to_dict()`.
    tasks: Mapping[str, Any] | None = None
    # The fields of `evaluation.result.Speed`.
    speed: Mapping[str, Any] | None = None
    # The cost, None where there was none. Of the original it is what its methods share.
    layer_forwards: float | None = None
    plan_seconds: float | None = None
    heal_forwards: float | None = None
    heal_seconds: float | None = None
    # Its recipe, relative to the folder; None where the method did not reach this depth.
    recipe: str | None = None
    recipe_sha256: str | None = None
    # Of the weights of a model that existed already.
    weights_sha256: str | None = None
    # A remark on it, or why the method did not reach this depth.
    note: str | None = None

    @property
    def key(self) -> Key:
        """What identifies it."""
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
        """All of it on one line, for a person."""
        words = []
        for text, found in self.perplexity.items():
            digits = ".2f" if found["value"] < 1e5 else ".3g"
            words.append(f"{text} {found['value']:{digits}}" + (f" ± {found['stderr']:.2g}" if found["stderr"] else ""))
        if self.answers is not None:
            words.append(f"agreement {self.answers['agreement']['value']:.3f}")
        if self.tasks is not None:
            words.append(f"mean accuracy {self.tasks['mean']:.4f}")
        if self.speed is not None:
            words.append(f"{self.speed['decode_tokens_per_s']:.1f} tokens/s")
        return f"{self.full_name}: " + ", ".join([*words, *([self.note] if self.note else [])])

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second while decoding."""
        return None if self.speed is None else self.speed.get("decode_tokens_per_s")

    def score(self, task: str) -> Measure | None:
        """Return the result of a task in its primary metric; for `mean`, the mean over the tasks."""
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
    """A comparison, finished or not."""

    path: Path
    model: str
    base_sha256: str | None
    settings: Mapping[str, Any]
    eval_texts: Sequence[Mapping[str, Any]]
    # Names of the tasks.
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    # The models that the finished comparison has, where the folder records them.
    asked: tuple[Key, ...] = ()
    # All of `compare.json`.
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the evaluation texts."""
        return tuple(text["name"] for text in self.eval_texts)

    @property
    def dense(self) -> Row | None:
        """The original model, where it has been measured."""
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
        # Results name the tasks as they were scored; before the first row there are only the names asked for.
        tasks=tuple(dict.fromkeys(scored)) or tuple(dict.fromkeys(named)),
        rows=rows,
        asked=_asked(facts.get("asked") or {}),
        facts=facts,
    )


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read the rows of a `rows.jsonl`, in order; none where there is no such file yet.

    Raises:
        UserError: a complete line is no row.
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
    """Return a task's main metric: the one that it names, else acc_norm, else acc, else the first."""
    metrics = score.get("metrics") or {}
    for name in (score.get("primary"), "acc_norm", "acc", *metrics):
        if name in metrics:
            found = metrics[name]
            return found if isinstance(found, Mapping) else {"value": found}
    return None


def columns(comparison: Comparison) -> list[str]:
    """Return the columns of the table that are not empty."""
    return list(dict.fromkeys(key for row in comparison.rows for key in _cells(row, comparison)))


def cells(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a mapping for each row, numbers as numbers. A standard error has a column of its own after its measure."""
    return [_cells(row, comparison) for row in comparison.rows]


def as_csv(comparison: Comparison) -> str:
    """Return the whole table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(comparison), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(comparison))
    return text.getvalue()


def as_markdown(comparison: Comparison) -> str:
    """Return the table as Markdown, each measure with its standard error."""
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
    """Return a cell as text, with its standard error."""
    value, error = row.get(name), row.get(f"{name} stderr")
    if value is None or isinstance(value, str):
        return value or ""
    if name == "layers":
        return str(value)
    if name in ("parameters", "bytes"):
        return short(value)
    digits = ".2g" if abs(value) >= 1e5 and error else ".1f" if abs(value) >= 10 else ".3f"
    return f"{value:{digits}}" + (f" ± {error:.2g}" if error else "")


def _stderr_of_mean(measures: Sequence[Measure | None]) -> float | None:
    """Of the mean over tasks, which are drawn independently; None where one of them has no error of its own."""
    errors = [None if measure is None else measure.get("stderr") for measure in measures]
    known = [float(error) for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.sqrt(sum(error * error for error in known)) / len(known)


def _settings(path: Path) -> dict[str, Any]:
    return read_json(
        path,
        expected="a JSON object with the settings of a comparison, as `intarsia compare` writes it",
        remedy="Give the folder of a comparison, or make one with `intarsia compare MODEL -o DIR`.",
    )


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
        raise UserError(
            f"{where} is no row of a comparison with at least `method` and `layers` ({type(error).__name__}: {error}).",
            "The file is damaged: delete this line, and the same command measures the model again.",
        ) from error
    return row


def _cells(row: Row, comparison: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = {"method": row.method, "layers": row.layers, "heal": row.heal}
    found |= {"parameters": row.parameters, "bytes": row.bytes}
    measures = {text: row.perplexity.get(text) for text in comparison.texts or tuple(row.perplexity)}
    if row.answers is not None:
        measures |= {name: row.answers.get(key) for name, key in ANSWERS.items()}
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
