"""Values as a person reads them. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def written(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {written(part)}" for name, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(written(part) for part in value)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def model_name(model: str) -> str:
    """What a model is called, without the folders of somebody's machine."""
    return Path(model).name if Path(model).is_absolute() else model


def duration(seconds: float) -> str:
    """A time in the two largest units that it has."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def measure(key: str, value: Any) -> str:
    """A measure as a person reads it, with its standard error."""
    if isinstance(value, Mapping):
        error = value.get("stderr")
        return measure(key, value.get("value")) + ("" if error is None else f" ± {error:.2g}")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return written(value)
    if key.endswith("bytes"):
        return f"{value / 1e9:.4g} GB" if value >= 1e9 else f"{value / 1e6:.4g} MB"
    if key.endswith("seconds"):
        return duration(value)
    return short(value)


def change(old: Any, new: Any) -> str:
    """How far a number moved, in per cent of where it was."""
    first, second = plain_value(old), plain_value(new)
    if not all(isinstance(each, int | float) for each in (first, second)) or not first:
        return ""
    return f"{second / first - 1:+.1%}"


def plain_value(measured: Any) -> Any:
    """A measure without what is known about it."""
    return measured.get("value") if isinstance(measured, Mapping) else measured


def short(value: float) -> str:
    """A number in few characters: 134.5M, 25k, 29.5, 0.034."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"
