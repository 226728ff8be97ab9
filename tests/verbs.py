"""`plan` and `compress` with their options one by one, as most tests give a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import intarsia
from intarsia.commands.compress import CompressResult
from intarsia.commands.plan import PlanResult
from intarsia.options import EvalSpec, Output, Runtime, Target, TextSpec


def plan(model: str, run: Path, *, dry_run: bool = False, **options: Any) -> PlanResult:
    return intarsia.plan(model, run, target_of(options), dry_run=dry_run, **common(options))


def compress(model: str, out: Path, *, eval_text: Path | str | None = None, **options: Any) -> CompressResult:
    texts = () if eval_text is None else (str(eval_text),)
    given = {key: options.pop(key) for key in ("windows", "tasks", "answers", "prompts", "speed") if key in options}
    evaluation = EvalSpec(text=texts, **{"answers": 2, "speed": False, **given})
    output = Output(path=out, **taken(Output, options))
    heal = options.pop("heal", ("closed-form",))
    target = target_of(options)
    return intarsia.compress(model, output, target, heal=heal, evaluation=evaluation, **common(options))


def common(options: dict[str, Any]) -> dict[str, Any]:
    """Method, text and runtime of a verb."""
    method = options.pop("settings", None) or options.pop("method", "come")
    options.pop("method", None)
    source = options.pop("calibration", "self")
    sources = (source,) if isinstance(source, str) else tuple(source)
    text = TextSpec(sources=sources, **taken(TextSpec, options))
    runtime = Runtime(**taken(Runtime, options))
    assert not options, options
    return {"method": method, "text": text, "runtime": runtime}


def target_of(options: dict[str, Any]) -> Target:
    return Target(**taken(Target, options))


def taken(kind: type, options: dict[str, Any]) -> Mapping[str, Any]:
    """Those options that are fields of a value object, taken out."""
    names = {field.name for field in fields(kind)}
    return {name: options.pop(name) for name in list(options) if name in names}
