"""The command that makes a result again, from the recorded settings."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from intarsia.flags import options_of
from intarsia.registry import planners

_DEFAULTS: Mapping[str, Any] = {"tokens": 65536, "seq_len": 512, "seed": 0, "calibration": "self"}
_GENERAL = ("revision", "calibration", "tokens", "seq_len", "seed")


def plan_command(settings: Mapping[str, Any], *, run: str, layers: int | None) -> str:
    """Return `intarsia plan ...` with every option that is not its default."""
    words = ["intarsia", "plan", str(settings["model"]), "--run", run]
    return shlex.join([*words, *_target(layers), *_options(settings)])


def compress_command(settings: Mapping[str, Any], *, out: str, layers: int, heal: str) -> str:
    """Return `intarsia compress ...`, likewise."""
    words = ["intarsia", "compress", str(settings["model"]), "-o", out]
    healed = [] if heal == "closed-form" else ["--heal", heal]
    return shlex.join([*words, *_target(layers), *_options(settings), *healed])


def compare_command(facts: Mapping[str, Any], *, out: str) -> str | None:
    """Return `intarsia compare ...` from what a comparison has recorded; None where that is not enough."""
    asked = facts.get("asked") or {}
    if not (asked.get("methods") and asked.get("layers") and facts.get("model")):
        return None
    words = ["intarsia", "compare", str(facts["model"]), "-o", out, "--methods", ",".join(asked["methods"])]
    words += ["--layers", _listed(asked["layers"])]
    if asked.get("heal", ["none"]) != ["none"]:
        words += ["--heal", _listed(asked["heal"])]
    return shlex.join(
        [*words, *_evaluating(facts, asked), *_general({**facts.get("settings", {}), **_revision(facts)})]
    )


def _evaluating(facts: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    texts = facts.get("eval_texts") or []
    for text in texts:
        # A name made from a share of a file is not a valid name on the command line.
        plain = not any(mark in text["name"] for mark in "/\\#:")
        words += ["--eval-text", f"{text['name']}={text['spec']}" if plain else str(text["spec"])]
    windows = [str(text["windows"]) for text in texts]
    for count in [] if set(windows) <= {"64"} else windows if len(set(windows)) > 1 else windows[:1]:
        words += ["--eval-windows", count]
    tasks = facts.get("tasks") or []
    if tasks:
        words += ["--tasks", _listed(task["spec"] for task in tasks)]
        words += [] if asked.get("task_layers") is None else ["--task-layers", _listed(asked["task_layers"])]
        for name in ("limit", "include_path"):
            given = next((task[name] for task in tasks if task.get(name) is not None), None)
            words += [] if given is None else [f"--{name.replace('_', '-')}", str(given)]
    return [*words, *(["--speed"] if asked.get("speed") else [])]


def _revision(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"revision": facts.get("revision")}


def _listed(values: Iterable[Any]) -> str:
    return ",".join(map(str, values))


def _target(layers: int | None) -> list[str]:
    return [] if layers is None else ["--layers", str(layers)]


def _options(settings: Mapping[str, Any]) -> list[str]:
    """Those of the method that are not their defaults; of a plugin that is not loaded none are known."""
    method = str(settings["method"])
    words = [*([] if method == "come" else ["--method", method]), *_general(settings)]
    kind = planners.get(method).settings if method in planners else None
    options = {} if kind is None else {option.attribute: option for option in options_of(kind)}
    for name, value in (settings.get("planner") or {}).items():
        if name in options and value != options[name].default:
            words += options[name].words(value)
    return words


def _general(settings: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name in _GENERAL:
        value = settings.get(name)
        if value is not None and value != _DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words
