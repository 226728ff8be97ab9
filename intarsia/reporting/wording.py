"""Values, settings and commands in words: for the screen, reports and model cards."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.flags import options_of
from intarsia.inspection.own_code import OPTION, OWN_CODE
from intarsia.options import TextSpec
from intarsia.progress import duration
from intarsia.registry import planners

MEASURES = {
    "layers": "layers",
    "parameters": "parameters",
    "bytes": "size",
    "perplexity": "perplexity",
    "perplexity_without_heal": "perplexity before healing",
    "agreement": "agreement",
    "next_token_kl": "KL of next tokens",
    "loops": "answers that loop",
    "answer_length": "tokens of an answer",
    "answer_perplexity": "perplexity of answers",
    "accuracy": "accuracy on tasks",
    "prefill_per_s": "tokens/s, prompt",
    "decode_per_s": "tokens/s, writing",
}
"""Headings of measures, by key."""

PARTING = "By greedy decoding. Text shared with the original is grey; the first token that differs is marked."
"""The explanation of two answers side by side."""


def text_of(key: str, value: Any, *, brief: bool = False) -> str:
    """A value as text; its key gives the unit: `...bytes`, `...seconds`.

    Args:
        brief: numbers in few characters and without errors, for a tile.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_measure(value):
        error = value.get("stderr")
        return text_of(key, value["value"], brief=brief) + ("" if error is None or brief else f" ± {error:.2g}")
    if isinstance(value, Mapping):
        return ", ".join(f"{title_of(name)} {text_of(name, part)}" for name, part in value.items() if part is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(text_of(key, part) for part in value)
    if not isinstance(value, int | float):
        return str(value)
    if key.endswith("bytes"):
        return size(value, digits=3 if brief else 4)
    if key.endswith("seconds"):
        return duration(value) if value >= 10 else f"{value:.2g} s"
    if brief:
        return short(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:,.1f}".removesuffix(".0") if 100 <= abs(value) < 1e15 else f"{value:.4g}"


def title_of(key: str) -> str:
    """A key as a heading."""
    return str(key).replace("_per_s", " tokens/s").replace("held_out", "held-out").replace("_", " ")


def size(count: float, *, digits: int = 4) -> str:
    """Bytes in decimal units, as disks and model hubs count."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.{digits}g} {unit}"
        count /= 1000
    return f"{count:.{digits}g} GB"


def short(value: float) -> str:
    """A number in few characters: 134.5M, 25k, 29.5, 0.034."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"


def change(old: Any, new: Any) -> str:
    """The change of a number in per cent; empty if it is unknown."""
    first, second = (each["value"] if is_measure(each) else each for each in (old, new))
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in (first, second)) or not first:
        return ""
    return f"{second / first - 1:+.1%}"


def is_measure(value: Any) -> bool:
    """Whether a value is a number with its uncertainty, which is shown as one value."""
    return isinstance(value, Mapping) and isinstance(value.get("value"), int | float)


def pairs_of(facts: Mapping[str, Any], *, before: str = "") -> list[tuple[str, str]]:
    """Names and values as text, without None; `before` is a prefix of the names."""
    named = ((name, value) for name, value in facts.items() if value is not None)
    return [(before + name.replace("_", " "), text_of("", value) or "none") for name, value in named]


def texts_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of measures as rows of a table."""
    return [{MEASURES.get(name) or title_of(name): text_of(name, value) for name, value in row.items()} for row in rows]


def rows_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of measures before and after."""
    return [
        {
            "": MEASURES.get(key) or title_of(key),
            "before": text_of(key, before.get(key)),
            "after": text_of(key, after.get(key)),
            "change": change(before.get(key), after.get(key)),
        }
        for key in dict.fromkeys([*before, *after])
        if before.get(key) is not None or after.get(key) is not None
    ]


def text_name(source: str) -> str:
    """The name of a calibration text; `self` is self-written text."""
    return source.replace("self", "self-written text") if source.split()[:1] == ["self"] else source


def model_name(model: str) -> str:
    """A model's name, without local folders."""
    return Path(model).name if Path(model).is_absolute() else model


def command(verb: str, *words: str, given: Iterable[object] = ()) -> str:
    """A command line: `words`, and every non-default option of the given value objects."""
    options = [word for values in given for word in _options(type(values), vars(values))]
    return shlex.join(["intarsia", verb, *words, *options])


def run_command(verb: str, settings: Mapping[str, Any], *words: str) -> str:
    """The command with the settings of a run, without options of plugins that are not loaded."""
    method, revision = str(settings["method"]), settings.get("revision")
    kind = planners.get(method).settings if method in planners else None
    text = {"sources": (settings.get("calibration", "self"),), **settings}
    options = [*([] if revision is None else ["--revision", str(revision)]), *_options(TextSpec, text)]
    options += [] if kind is None else _options(kind, settings.get("planner") or {})
    options += [OPTION] if OWN_CODE in (settings.get("config") or {}) else []
    return command(verb, str(settings["model"]), *words, "--method", method, *options)


def _options(kind: type, values: Mapping[str, Any]) -> list[str]:
    found = [(option, values[option.attribute]) for option in options_of(kind) if option.attribute in values]
    return [word for option, value in found if value != option.default for word in option.words(value)]
