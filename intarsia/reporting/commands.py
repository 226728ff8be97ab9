"""The command lines that make something again, from the settings that were recorded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from intarsia.planning.ladder import settings_of

_DEFAULTS: Mapping[str, Any] = {"tokens": 65536, "seq_len": 512, "seed": 0, "calibration": "self"}
_GENERAL = ("revision", "calibration", "tokens", "seq_len", "dtype", "batch_tokens", "seed")


def plan_command(settings: Mapping[str, Any], *, run: str, layers: int | None) -> str:
    """`intarsia plan ...` with everything that is not its default."""
    words = ["intarsia", "plan", str(settings["model"]), "--run", run]
    return shlex.join([*words, *_target(layers), *_options(settings)])


def compress_command(settings: Mapping[str, Any], *, out: str, layers: int, heal: str) -> str:
    """`intarsia compress ...`, likewise."""
    words = ["intarsia", "compress", str(settings["model"]), "-o", out]
    healed = [] if heal == "closed-form" else ["--heal", heal]
    return shlex.join([*words, *_target(layers), *_options(settings), *healed])


def _target(layers: int | None) -> list[str]:
    return [] if layers is None else ["--layers", str(layers)]


def _options(settings: Mapping[str, Any]) -> list[str]:
    method = str(settings["method"])
    words = [] if method == "come" else ["--method", method]
    for name in _GENERAL:
        value = settings.get(name)
        if value is not None and value != _DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    default = settings_of(method, None)
    usual = {} if default is None else default.to_dict()
    prefix = "laco-" if method == "laco" else ""
    for name, value in (settings.get("planner") or {}).items():
        if name not in usual or value == usual[name] or value is None:
            continue
        option = f"{prefix}{name.replace('_', '-')}"
        words += _flag(option, value) if isinstance(value, bool) else [f"--{option}", str(value)]
    return words


def _flag(option: str, value: bool) -> list[str]:
    return [f"--{option}" if value else f"--no-{option}"]
