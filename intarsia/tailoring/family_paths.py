"""A family file whose paths do not depend on where a command runs.

In a family file that a user writes, paths are relative to the folder in which the command runs. What a run folder
keeps, and what workers elsewhere are given, has absolute ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from intarsia.checkpoint.resolve import DEMO
from intarsia.data_file import read_yaml
from intarsia.evaluation.task_file import names_a_file
from intarsia.planning.ladder import METHODS as PLANNERS
from intarsia.tailoring.family_file import RANDOM_MIDDLE, FamilyFile, MemberSpec

_SOURCES = ("task", "loss", "kl")


def absolute(file: FamilyFile) -> FamilyFile:
    """The family file with absolute paths; names that are no path there is stay as they are."""

    def member(spec: MemberSpec) -> MemberSpec:
        return replace(spec, model=absolute_path(spec.model))

    return replace(
        file,
        base=member(file.base),
        variants=tuple(map(member, file.variants)),
        objectives=tuple(replace(each, source=_source(each.kind, each.source)) for each in file.objectives),
        search=replace(file.search, warm_start=tuple(map(_start, file.search.warm_start))),
    )


def absolute_data(path: Path) -> dict[str, Any]:
    """What a family file that was read without complaint says, as plain data with absolute paths."""
    data: dict[str, Any] = read_yaml(path, what="a family")
    data["base"] = _member(data["base"])
    if data.get("variants"):
        data["variants"] = {name: _member(entry) for name, entry in data["variants"].items()}
    data["objectives"] = [
        {key: _source(key, value) if key in _SOURCES else value for key, value in entry.items()}
        for entry in data["objectives"]
    ]
    if data.get("search") and data["search"].get("warm_start"):
        data["search"]["warm_start"] = [_start(start) for start in data["search"]["warm_start"]]
    return data


def absolute_path(name: str) -> str:
    """A file or folder that is there by its absolute path, with the part of a file that is asked for."""
    if name == DEMO:
        return name
    whole = Path(name).expanduser()
    if whole.exists():
        return str(whole.resolve())
    file, mark, part = name.partition("#")
    path = Path(file).expanduser()
    return f"{path.resolve()}{mark}{part}" if mark and path.exists() else name


def _source(kind: str, name: str) -> str:
    """A task of lm-eval keeps its name, whatever folder is called so."""
    return name if kind == "task" and not names_a_file(name) else absolute_path(name)


def _start(name: str) -> str:
    return name if name in (RANDOM_MIDDLE, *PLANNERS) else absolute_path(name)


def _member(entry: Any) -> Any:
    return absolute_path(entry) if isinstance(entry, str) else {**entry, "model": absolute_path(entry["model"])}
