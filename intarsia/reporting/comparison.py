"""A comparison of methods on disk.

A folder with `compare.json` (what was compared, on which texts and tasks) and `rows.jsonl` (one model a line, appended
as it is measured; the original is the row with method `dense`). A last line that a kill cut off does not count; of two
lines about the same model the later one does.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intarsia.disk import read_json
from intarsia.errors import UserError

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
    end, where the folder says so; `facts` is all that it says.
    """

    path: Path
    model: str
    base_sha256: str | None
    settings: Mapping[str, Any]
    eval_texts: Sequence[Mapping[str, Any]]
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    asked: tuple[Key, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

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
        facts=facts,
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


def _settings(path: Path) -> dict[str, Any]:
    return read_json(
        path,
        expected="a JSON object: what a comparison is about, as `intarsia compare` writes it",
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
        raise UserError.of(
            where=where,
            expected="a row of a comparison, with at least `method` and `layers`",
            found=f"{type(error).__name__}: {error}",
            remedy="The file is damaged: delete this line, and the same command measures the model again.",
        ) from error
    return row
