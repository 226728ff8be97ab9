"""From a `config.json` to an `Anatomy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intarsia.anatomy.family import Family
from intarsia.anatomy.family_file import as_family, family_files, uncovered
from intarsia.anatomy.layer_lists import kinds, lists
from intarsia.anatomy.spec import Anatomy, Linear, Norm
from intarsia.errors import Problem, UserError


def known_families() -> dict[str, Family]:
    """Every family this version knows, by name."""
    return {name: as_family(name, data) for name, data in family_files().items()}


def detect(config: Mapping[str, Any], *, where: str = "config.json") -> Anatomy:
    """The anatomy of the model that a config describes.

    Raises:
        UserError: the family is unknown, has a feature that its anatomy does not cover, or a number is missing or
            impossible. All problems of the config are reported at once.
    """
    model_type = config.get("model_type")
    for name, data in family_files().items():
        if model_type in data["model_types"] and _holds(data.get("when", {}), _values(data, config)):
            return _resolve(as_family(name, data), data, config, where)
    if isinstance(model_type, str) and model_type in uncovered():
        entry = uncovered()[model_type]
        raise UserError.of(
            where=f"{where}: model_type {model_type!r}",
            expected="a model whose layers an anatomy covers",
            found=entry["feature"],
            remedy=entry["remedy"],
        )
    known = ", ".join(sorted({kind for data in family_files().values() for kind in data["model_types"]}))
    raise UserError.of(
        where=f"{where}: model_type",
        expected=f"one of {known}",
        found=repr(model_type),
        remedy="Use a model of a known family, or describe this one in a family file: docs/ADD_A_FAMILY.md says how, "
        "and `intarsia anatomy check --family-file` tries it.",
    )


def _resolve(family: Family, data: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Anatomy:
    values = _values(data, config)
    problems = list(_refusals(family, data, values, where))
    numbers: dict[str, int] = {}
    for key in ("layers", "width", "query_heads", "vocabulary"):
        numbers[key] = _number(values, family.fields[key], where, problems)
    constants = data.get("constants", {})
    usual = numbers["width"] * constants["channels_per_width"] if "channels_per_width" in constants else None
    numbers["channels"] = _number(values, family.fields["channels"], where, problems, usual)
    numbers["kv_heads"] = constants.get("kv_heads") or _number(
        values, family.fields.get("kv_heads"), where, problems, numbers["query_heads"]
    )
    numbers["experts"] = _number(values, family.fields["experts"], where, problems) if "experts" in family.fields else 0
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
    per_layer = lists(family.per_layer, values, numbers["layers"], where, problems)
    scale = values.get(family.fields.get("residual_scale", ""), 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        problems.append(_not_expected(f"{where}: {family.fields['residual_scale']}", "a number", scale))
    linears = tuple(_linear(entry, values, where, problems) for entry in data["linear"])
    if problems:
        raise UserError(problems)
    return Anatomy(
        family=family,
        linears=linears,
        norms=tuple(_norm(entry, values) for entry in data["norm"]),
        n_layers=numbers["layers"],
        width=numbers["width"],
        n_query_heads=numbers["query_heads"],
        n_kv_heads=numbers["kv_heads"],
        head_dim=numbers["head_dim"],
        n_channels=numbers["channels"],
        vocabulary=numbers["vocabulary"],
        tied=bool(values.get(family.fields["tied"], False)),
        layer_types=kinds(family.per_layer, per_layer),
        config=dict(config),
        per_layer=per_layer,
        n_experts=numbers["experts"],
        parallel=_flag(data.get("parallel", False), values),
        residual_scale=float(scale),
        approximations=(
            *data["approximations"],
            *(entry["text"] for entry in data.get("approximation", ()) if _holds(entry["when"], values)),
        ),
    )


def _values(data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    # A null is not a missing field: transformers computes what is null, and takes its default for what is missing.
    found = {key: value for key, value in {**data.get("defaults", {}), **config}.items() if value is not None}
    for other, name in data.get("aliases", {}).items():
        if other in found:
            found.setdefault(name, found[other])
    return found


def _refusals(family: Family, data: Mapping[str, Any], values: Mapping[str, Any], where: str) -> list[Problem]:
    return [
        Problem(
            where=where,
            expected=f"a {family.title} model that the anatomy covers",
            found=entry["feature"],
            remedy=entry["remedy"],
        )
        for entry in data.get("refuse", ())
        if _holds(entry.get("when", {}), values)
        and not ("when_not" in entry and _holds(entry["when_not"], values))
        and entry.get("unless") not in values
    ]


def _holds(when: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(values.get(key) == value for key, value in when.items())


def _number(
    values: Mapping[str, Any], field: str | None, where: str, problems: list[Problem], default: int | None = None
) -> int:
    found = default if field is None else values.get(field, default)
    if isinstance(found, int) and not isinstance(found, bool) and found > 0:
        return found
    problems.append(_not_expected(f"{where}: {field}", "a positive whole number", found))
    return 1


def _not_expected(where: str, expected: str, found: Any) -> Problem:
    return Problem(
        where=where,
        expected=expected,
        found="nothing" if found is None else repr(found),
        remedy="Complete the config.",
    )


def _flag(value: Any, values: Mapping[str, Any]) -> bool:
    """A TOML value that is a truth value, or the name of the config field that holds it."""
    return bool(values.get(value, False)) if isinstance(value, str) else bool(value)


def _linear(entry: Mapping[str, Any], values: Mapping[str, Any], where: str, problems: list[Problem]) -> Linear:
    whole = entry.get("whole")
    return Linear(
        module=entry["module"],
        part=entry["part"],
        side=entry["side"],
        segments=tuple(entry["segments"]),
        bias=_flag(entry.get("bias", False), values),
        per_expert=bool(entry.get("per_expert", False)),
        whole=_number(values, whole, where, problems) if isinstance(whole, str) else whole,
    )


def _norm(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Norm:
    return Norm(
        module=entry["module"],
        part=entry["part"],
        place=entry["place"],
        offset=float(entry.get("offset", 0.0)),
        weight=_flag(entry.get("weight", True), values),
        bias=_flag(entry.get("bias", False), values),
        rows=entry.get("rows"),
        serves=tuple(entry.get("serves", ())),
    )
