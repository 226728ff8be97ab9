"""From a `config.json` to an `Anatomy`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from intarsia.anatomy.spec import Anatomy, Family, Linear, Norm
from intarsia.errors import Problem, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@cache
def _family_files() -> dict[str, dict[str, Any]]:
    folder = files("intarsia.anatomy") / "families"
    return {
        entry.name.removesuffix(".toml"): tomllib.loads(entry.read_text(encoding="utf-8"))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def known_families() -> dict[str, Family]:
    """Every family this version knows, by name."""
    return {name: _family(name, data) for name, data in _family_files().items()}


def _family(name: str, data: Mapping[str, Any]) -> Family:
    return Family(
        name=name,
        title=data["title"],
        model_types=tuple(data["model_types"]),
        layers_module=data["modules"]["layers"],
        embedding_module=data["modules"]["embedding"],
        head_module=data["modules"]["head"],
        fields=dict(data["fields"]),
        per_layer_fields=tuple(data["per_layer_fields"]),
        approximations=tuple(data["approximations"]),
    )


def detect(config: Mapping[str, Any], *, where: str = "config.json") -> Anatomy:
    """The anatomy of the model that a config describes.

    Raises:
        UserError: the family is unknown, has a feature that its anatomy does not cover, or a number is missing or
            impossible. All problems of the config are reported at once.
    """
    model_type = config.get("model_type")
    for name, data in _family_files().items():
        if model_type in data["model_types"]:
            return _resolve(_family(name, data), data, config, where)
    known = ", ".join(sorted(kind for data in _family_files().values() for kind in data["model_types"]))
    raise UserError.of(
        where=f"{where}: model_type",
        expected=f"one of {known}",
        found=repr(model_type),
        remedy="Use a model of a known family.",
    )


def _resolve(family: Family, data: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Anatomy:
    # A null is not a missing field: transformers computes what is null, and takes its default for what is missing.
    values = {key: value for key, value in {**data.get("defaults", {}), **config}.items() if value is not None}
    problems = list(_refusals(family, data, values, where))
    numbers: dict[str, int] = {}
    for key in ("layers", "width", "query_heads", "channels", "vocabulary"):
        numbers[key] = _number(values, family.fields[key], where, problems)
    numbers["kv_heads"] = _number(values, family.fields.get("kv_heads"), where, problems, numbers["query_heads"])
    heads = max(numbers["query_heads"], 1)
    numbers["head_dim"] = _number(values, family.fields.get("head_dim"), where, problems, numbers["width"] // heads)
    if not problems and numbers["query_heads"] % numbers["kv_heads"]:
        problems.append(
            Problem(
                where=f"{where}: {family.fields['query_heads']}",
                expected=f"a multiple of the {numbers['kv_heads']} key/value heads",
                found=str(numbers["query_heads"]),
                remedy="The config does not describe grouped-query attention; mend it.",
            )
        )
    layer_types = values.get("layer_types")
    if layer_types is not None and not _is_list_of_names(layer_types, numbers["layers"]):
        problems.append(
            Problem(
                where=f"{where}: layer_types",
                expected=f"a list of {numbers['layers']} names, one a layer",
                found=f"a list of {len(layer_types)}" if isinstance(layer_types, list) else repr(layer_types),
                remedy="Make layer_types as long as the model is deep.",
            )
        )
    if problems:
        raise UserError(problems)
    return Anatomy(
        family=family,
        linears=tuple(_linear(entry, values) for entry in data["linear"]),
        norms=tuple(_norm(entry, values) for entry in data["norm"]),
        n_layers=numbers["layers"],
        width=numbers["width"],
        n_query_heads=numbers["query_heads"],
        n_kv_heads=numbers["kv_heads"],
        head_dim=numbers["head_dim"],
        n_channels=numbers["channels"],
        vocabulary=numbers["vocabulary"],
        tied=bool(values.get(family.fields["tied"], False)),
        layer_types=None if layer_types is None else tuple(layer_types),
        config=dict(config),
    )


def _refusals(family: Family, data: Mapping[str, Any], values: Mapping[str, Any], where: str) -> list[Problem]:
    return [
        Problem(
            where=where,
            expected=f"a {family.title} model that the anatomy covers",
            found=entry["feature"],
            remedy=entry["remedy"],
        )
        for entry in data.get("refuse", ())
        if all(values.get(key) == value for key, value in entry["when"].items()) and entry.get("unless") not in values
    ]


def _number(
    values: Mapping[str, Any], field: str | None, where: str, problems: list[Problem], default: int | None = None
) -> int:
    found = default if field is None else values.get(field, default)
    if isinstance(found, int) and not isinstance(found, bool) and found > 0:
        return found
    problems.append(
        Problem(
            where=f"{where}: {field}",
            expected="a positive whole number",
            found="nothing" if found is None else repr(found),
            remedy="Complete the config.",
        )
    )
    return 1


def _is_list_of_names(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(name, str) for name in value)


def _flag(value: Any, values: Mapping[str, Any]) -> bool:
    """A TOML value that is a truth value, or the name of the config field that holds it."""
    return bool(values.get(value, False)) if isinstance(value, str) else bool(value)


def _linear(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Linear:
    return Linear(
        module=entry["module"],
        part=entry["part"],
        side=entry["side"],
        segments=tuple(entry["segments"]),
        bias=_flag(entry.get("bias", False), values),
    )


def _norm(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Norm:
    return Norm(
        module=entry["module"],
        part=entry["part"],
        place=entry["place"],
        offset=float(entry.get("offset", 0.0)),
        weight=_flag(entry.get("weight", True), values),
        bias=_flag(entry.get("bias", False), values),
    )
