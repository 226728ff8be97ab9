"""Families as files: those of the package, and one that a user tries before it is among them.

docs/ADD_A_FAMILY.md says what the fields mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from intarsia.anatomy.family import Family, PerLayer, Stacked
from intarsia.anatomy.family_faults import faults
from intarsia.errors import Problem, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_tried: dict[str, dict[str, Any]] = {}


def family_files() -> dict[str, dict[str, Any]]:
    """The data of every known family, by name. One that is being tried stands in front of the others."""
    return {**_tried, **{name: data for name, data in _packaged().items() if name not in _tried}}


@contextmanager
def with_family_file(path: Path | None) -> Iterator[None]:
    """While open, the family of that file is known too; None: no other.

    Raises:
        UserError: it is no family file. Everything that is wrong with it is reported at once.
    """
    if path is None:
        yield
        return
    data = _read(path)
    _tried[path.stem] = data
    try:
        yield
    finally:
        del _tried[path.stem]


def as_family(name: str, data: Mapping[str, Any]) -> Family:
    """What a family's file says of every one of its models."""
    return Family(
        name=name,
        title=data["title"],
        model_types=tuple(data["model_types"]),
        layers_module=data["modules"]["layers"],
        embedding_module=data["modules"]["embedding"],
        head_module=data["modules"]["head"],
        head_in_memory=data["modules"].get("head_in_memory", data["modules"]["head"]),
        renamed=dict(data.get("renamed", {})),
        stacked=tuple(
            Stacked(parameter=entry["parameter"], tensors=tuple(entry["tensors"])) for entry in data.get("stacked", ())
        ),
        experts_module=data["modules"].get("experts", ""),
        buffers=tuple(data.get("buffers", ())),
        caches_query_heads=bool(data.get("caches_query_heads", False)),
        tiny=dict(data.get("tiny", {})),
        fields=dict(data["fields"]),
        per_layer=(
            *(PerLayer(field=field) for field in data.get("per_layer_fields", ())),
            *(_per_layer(entry) for entry in data.get("per_layer", ())),
        ),
        approximations=(
            *data["approximations"],
            *(f"{entry['text']} (where {_condition(entry['when'])})" for entry in data.get("approximation", ())),
        ),
    )


def _condition(when: Mapping[str, Any]) -> str:
    return " and ".join(f"{key} is {str(value).lower()}" for key, value in when.items())


def _per_layer(entry: Mapping[str, Any]) -> PerLayer:
    return PerLayer(**{**entry, "instead_of": tuple(entry.get("instead_of", ()))})


@cache
def _packaged() -> dict[str, dict[str, Any]]:
    folder = files("intarsia.anatomy") / "families"
    return {
        entry.name.removesuffix(".toml"): tomllib.loads(entry.read_text(encoding="utf-8"))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


@cache
def uncovered() -> dict[str, dict[str, str]]:
    """Model types that no anatomy can say yet: the feature that is in the way, and what to do instead."""
    text = (files("intarsia.anatomy") / "uncovered.toml").read_text(encoding="utf-8")
    return {kind: entry for entry in tomllib.loads(text)["family"] for kind in entry["model_types"]}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError.of(
            where=str(path),
            expected="a family file in TOML (docs/ADD_A_FAMILY.md)",
            found=getattr(error, "strerror", None) or str(error),
            remedy="Copy one of intarsia/anatomy/families/ and change it.",
        ) from error
    problems = [
        Problem(where=f"{path}: {where}", expected=expected, found=found, remedy="See docs/ADD_A_FAMILY.md.")
        for where, expected, found in faults(data)
    ]
    if problems:
        raise UserError(problems)
    return data
