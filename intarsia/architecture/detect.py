"""From a `config.json` to an `Architecture`, and whether it is that of the tensors which a checkpoint really has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from intarsia.architecture.families import Family, LinearEntry, NormEntry, Refusal, known_families, uncovered
from intarsia.architecture.per_layer import kinds, lists, unknown_settings
from intarsia.architecture.spec import Architecture, Linear, Norm
from intarsia.data_file import refusal
from intarsia.errors import Problem, UserError


class Undescribed(UserError):
    """No family file describes the layers of a model; it is none of what a family file refuses by mistake.

    Attributes:
        reason: what is in the way.
    """

    def __init__(
        self,
        problems: str | Iterable[Problem],
        hint: str = "",
        *,
        reason: str = "no family file describes its layers",
    ) -> None:
        super().__init__(problems, hint)
        self.reason = reason


def detect(config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """The architecture of the model that a config describes.

    Raises:
        UserError: the family is unknown, has a feature that its file does not cover, or a number is missing or
            impossible. All problems of the config are reported at once.
    """
    model_type = config.get("model_type")
    for family in known_families().values():
        if model_type in family.model_types and _holds(family.when, _values(family, config)):
            return _resolve(family, config, where)
    if isinstance(model_type, str) and model_type in uncovered():
        entry = uncovered()[model_type]
        raise Undescribed(
            f"{where}: model_type {model_type!r}: expected a model whose layers can be described; "
            f"found {entry['feature']}.",
            entry["remedy"],
            reason=entry["feature"],
        )
    known = ", ".join(sorted({kind for family in known_families().values() for kind in family.model_types}))
    raise Undescribed(
        f"{where}: model_type: expected one of {known}; found {model_type!r}.",
        "Use a model of a known family, or describe this one in a family file: docs/ADD_A_FAMILY.md says how, "
        "and `intarsia anatomy check --family-file` tries it.",
    )


def _resolve(family: Family, config: Mapping[str, Any], where: str) -> Architecture:
    values = _values(family, config)
    not_covered = _refusals(family, values, where)
    problems = list(not_covered)
    numbers: dict[str, int] = {}
    for key in ("layers", "width", "query_heads", "vocabulary"):
        numbers[key] = _number(values, family.fields[key], where, problems)
    constants = family.constants
    usual = numbers["width"] * constants.channels_per_width if constants.channels_per_width else None
    numbers["channels"] = _number(values, family.fields["channels"], where, problems, usual)
    numbers["kv_heads"] = constants.kv_heads or _number(
        values, family.fields.get("kv_heads"), where, problems, numbers["query_heads"]
    )
    numbers["experts"] = _number(values, family.fields["experts"], where, problems) if "experts" in family.fields else 0
    heads = max(numbers["query_heads"], 1)
    numbers["head_dim"] = _number(values, family.fields.get("head_dim"), where, problems, numbers["width"] // heads)
    if not problems and numbers["query_heads"] % numbers["kv_heads"]:
        problems.append(
            Problem(
                f"{where}: {family.fields['query_heads']}: "
                f"expected a multiple of the {numbers['kv_heads']} key/value heads; "
                f"found {numbers['query_heads']}.",
                "The config does not describe grouped-query attention; correct it.",
            )
        )
    per_layer = lists(family.per_layer, values, numbers["layers"], where, problems)
    if not problems:
        problems += unknown_settings(family, config, numbers["layers"], where)
    scale = values.get(family.fields.get("residual_scale", ""), 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        problems.append(_not_expected(f"{where}: {family.fields['residual_scale']}", "a number", scale))
    linears = tuple(_linear(entry, values, where, problems) for entry in family.linears)
    if problems:
        reason = "; ".join(entry.feature for entry in _refused_by(family, values))
        raise Undescribed(problems, reason=reason) if problems == not_covered else UserError(problems)
    return Architecture(
        family=family,
        linears=linears,
        norms=tuple(_norm(entry, values) for entry in family.norms),
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
        parallel=_flag(family.parallel, values),
        residual_scale=float(scale),
        approximations=(
            *family.always,
            *(entry.text for entry in family.sometimes if _holds(entry.when, values)),
        ),
    )


def _values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    # A null is not a missing field: transformers computes what is null, and takes its default for what is missing.
    found = {key: value for key, value in {**family.defaults, **config}.items() if value is not None}
    for other, name in family.aliases.items():
        if other in found:
            found.setdefault(name, found[other])
    return found


def _refusals(family: Family, values: Mapping[str, Any], where: str) -> list[Problem]:
    return [
        Problem(
            f"{where}: expected a {family.title} model that the family file covers; found {entry.feature}.",
            entry.remedy,
        )
        for entry in _refused_by(family, values)
    ]


def _refused_by(family: Family, values: Mapping[str, Any]) -> list[Refusal]:
    return [
        entry
        for entry in family.refusals
        if _holds(entry.when, values)
        and not (entry.when_not is not None and _holds(entry.when_not, values))
        and entry.unless not in values
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
        f"{where}: expected {expected}; found {'nothing' if found is None else repr(found)}.", "Complete the config."
    )


def _flag(value: Any, values: Mapping[str, Any]) -> bool:
    """A TOML value that is a truth value, or the name of the config field that holds it."""
    return bool(values.get(value, False)) if isinstance(value, str) else bool(value)


def _linear(entry: LinearEntry, values: Mapping[str, Any], where: str, problems: list[Problem]) -> Linear:
    whole = entry.whole
    return Linear(
        module=entry.module,
        part=entry.part,
        side=entry.side,
        segments=entry.segments,
        bias=_flag(entry.bias, values),
        per_expert=entry.per_expert,
        whole=_number(values, whole, where, problems) if isinstance(whole, str) else whole,
    )


def _norm(entry: NormEntry, values: Mapping[str, Any]) -> Norm:
    return Norm(
        module=entry.module,
        part=entry.part,
        place=entry.place,
        offset=entry.offset,
        weight=_flag(entry.weight, values),
        bias=_flag(entry.bias, values),
        rows=entry.rows,
        serves=entry.serves,
    )


def verify(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Check every layer tensor and the embedding for presence and shape.

    Raises:
        UserError: with the one cause where all names or the depth are others, else with every missing tensor, wrong
            shape and unexpected layer tensor (at most twenty are listed).
    """
    _check_names(architecture, shapes, where)
    _check_depth(architecture, shapes, where)
    # Some OPT sizes embed at a width of their own and project to the model's.
    embedding_width = architecture.config.get(architecture.family.fields.get("embedding_width", ""), architecture.width)
    expected: dict[str, tuple[int, ...]] = {
        f"{architecture.family.embedding_module}.weight": (architecture.vocabulary, embedding_width)
    }
    for layer in range(architecture.n_layers):
        for local, shape in architecture.layer_shapes().items():
            expected[architecture.tensor_name(layer, local)] = shape
    problems = [
        Problem(
            f"{where}: {name}: expected shape {list(shape)} by the config; "
            f"found {f'shape {list(shapes[name])}' if name in shapes else 'no such tensor'}.",
            "The config and the weights do not belong together; get the checkpoint again.",
        )
        for name, shape in expected.items()
        if tuple(shapes.get(name, ())) != tuple(shape)
    ]
    known = set(architecture.layer_shapes())
    prefix = f"{architecture.family.layers_module}."
    problems += [
        Problem(
            f"{where}: {name}: "
            f"expected only tensors that the family file of {architecture.family.title} covers; "
            f"found shape {list(shapes[name])}.",
            "Its layers hold something that would be lost; it cannot be pruned.",
        )
        for name in sorted(shapes)
        if name.startswith(prefix) and not _covered(name.removeprefix(prefix), known, architecture)
    ]
    if problems:
        raise refusal(problems, where=where, most=20)


def _check_names(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that all have another prefix than the family's, or none."""
    embedding = f"{architecture.family.embedding_module}.weight"
    if embedding in shapes:
        return
    prefix, _, bare = embedding.partition(".")
    longer = next((name for name in shapes if name.endswith(f".{embedding}")), None)
    if bare in shapes:
        raise UserError(
            f"{where} holds the tensors of a base class, without the prefix `{prefix}.` and without a head.",
            "Save it from AutoModelForCausalLM: from_pretrained(FOLDER).save_pretrained(NEW).",
        )
    if longer is not None:
        extra = longer.removesuffix(embedding)
        raise UserError(
            f"The names of the tensors in {where} start with `{extra}`, which models of this kind do not have.",
            "Save the model itself with save_pretrained(), not what is around it.",
        )


def _check_depth(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a config with another number of layers than the files hold."""
    prefix = f"{architecture.family.layers_module}."
    local = architecture.layer_shapes()
    split = (name.removeprefix(prefix).partition(".") for name in shapes if name.startswith(prefix))
    found = {int(index) for index, _, name in split if index.isdigit() and name in local}
    # A layer of which some tensors are missing is another fault.
    whole = all(architecture.tensor_name(layer, name) in shapes for layer in found for name in local)
    if found and whole and len(found) != architecture.n_layers and found == set(range(len(found))):
        field = architecture.family.fields["layers"]
        raise UserError(
            f"{where}: {field} is {architecture.n_layers} in the config, and the files hold {len(found)} layers.",
            f"Get config and weights that belong together; if the weights are right, set {field} to {len(found)}.",
        )


def _covered(rest: str, known: set[str], architecture: Architecture) -> bool:
    index, _, local = rest.partition(".")
    # Old Llama checkpoints carry a buffer of rotary frequencies, which is recomputed from the config.
    computed = local.endswith("rotary_emb.inv_freq") or local in architecture.family.buffers
    return index.isdigit() and int(index) < architecture.n_layers and (local in known or computed)
