"""From a `config.json` to an `Architecture`, and a check of the checkpoint's tensors against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from intarsia.architecture.families import Family, known_families, uncovered
from intarsia.architecture.per_layer import kinds, lists, unknown_settings
from intarsia.architecture.spec import Architecture, Linear, Norm
from intarsia.data_file import refusal
from intarsia.errors import Problem, UserError, mismatch


class Undescribed(UserError):
    """No family file describes the layers of a model, as opposed to one that refuses it for a mistake.

    Attributes:
        reason: the obstacle.
    """

    def __init__(
        self, problems: Problem | Iterable[Problem], *, reason: str = "no family file describes its layers"
    ) -> None:
        super().__init__(problems)
        self.reason = reason


def detect(config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """The architecture of the model that a config describes.

    Raises:
        UserError: the family is unknown, has a feature that its file does not cover, or a number is missing or
            impossible. All problems of the config are reported at once.
    """
    model_type = config.get("model_type")
    for family in known_families().values():
        if model_type in family.model_types and _hold(family.when, _values(family, config)):
            return _resolve(family, config, where)
    if isinstance(model_type, str) and model_type in uncovered():
        entry = uncovered()[model_type]
        problem = mismatch(
            f"{where}: model_type {model_type!r}",
            "a model whose layers can be described",
            entry["feature"],
            entry["remedy"],
        )
        raise Undescribed(problem, reason=entry["feature"])
    known = ", ".join(sorted({kind for family in known_families().values() for kind in family.model_types}))
    remedy = (
        "Use a model of a known family, or describe this one in a family file (docs/ADD_A_FAMILY.md), and try it "
        "with `intarsia anatomy check --family-file`."
    )
    raise Undescribed(mismatch(f"{where}: model_type", f"one of {known}", repr(model_type), remedy))


def _resolve(family: Family, config: Mapping[str, Any], where: str) -> Architecture:
    values = _values(family, config)
    refusals = [
        entry
        for entry in family.refusals
        if _hold(entry.when, values)
        and not (entry.when_not is not None and _hold(entry.when_not, values))
        and entry.unless not in values
    ]
    expected = f"a {family.title} model that the family file covers"
    problems = [mismatch(where, expected, entry.feature, entry.remedy) for entry in refusals]
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
            mismatch(
                f"{where}: {family.fields['query_heads']}",
                f"a multiple of the {numbers['kv_heads']} key/value heads",
                str(numbers["query_heads"]),
                "The config does not describe grouped-query attention; correct it.",
            )
        )
    per_layer = lists(family.per_layer, values, numbers["layers"], where, problems)
    if not problems:
        problems += unknown_settings(family, config, numbers["layers"], where)
    scale = values.get(family.fields.get("residual_scale", ""), 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        problems.append(_not_expected(f"{where}: {family.fields['residual_scale']}", "a number", scale))
    linears = []
    for entry in family.linears:
        whole = _number(values, entry.whole, where, problems) if isinstance(entry.whole, str) else entry.whole
        linears.append(Linear(**{**dict(entry), "bias": _flag(entry.bias, values), "whole": whole}))
    flags = [{name: _flag(getattr(norm, name), values) for name in ("weight", "bias")} for norm in family.norms]
    if problems:
        reason = "; ".join(entry.feature for entry in refusals)
        raise Undescribed(problems, reason=reason) if len(problems) == len(refusals) else UserError(problems)
    return Architecture(
        family=family,
        linears=tuple(linears),
        norms=tuple(Norm(**{**dict(norm), **own}) for norm, own in zip(family.norms, flags, strict=True)),
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
            *(entry.text for entry in family.sometimes if _hold(entry.when, values)),
        ),
    )


def _values(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    # A null is not a missing field: transformers computes null fields, and uses defaults for missing ones.
    found = {key: value for key, value in {**family.defaults, **config}.items() if value is not None}
    for other, name in family.aliases.items():
        if other in found:
            found.setdefault(name, found[other])
    return found


def _hold(when: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
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
    return mismatch(where, expected, "nothing" if found is None else repr(found), "Complete the config.")


def _flag(value: Any, values: Mapping[str, Any]) -> bool:
    """A TOML value that is a boolean, or the name of a config field with one."""
    return bool(values.get(value, False)) if isinstance(value, str) else bool(value)


def verify(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Check every layer tensor and the embedding for presence and shape.

    Raises:
        UserError: with the one cause if all names or the depth differ, else with every missing tensor, wrong shape and
            unexpected layer tensor (at most twenty).
    """
    _check_names(architecture, shapes, where)
    _check_depth(architecture, shapes, where)
    # Some OPT sizes embed at a width of their own and project to the model's.
    embedding_width = architecture.config.get(architecture.family.fields.get("embedding_width", ""), architecture.width)
    expected: dict[str, tuple[int, ...]] = {
        f"{architecture.family.modules.embedding}.weight": (architecture.vocabulary, embedding_width)
    }
    for layer in range(architecture.n_layers):
        for local, shape in architecture.layer_shapes().items():
            expected[architecture.tensor_name(layer, local)] = shape
    problems = [
        mismatch(
            f"{where}: {name}",
            f"shape {list(shape)} by the config",
            f"shape {list(shapes[name])}" if name in shapes else "no such tensor",
            "Config and weights do not match; download the checkpoint again.",
        )
        for name, shape in expected.items()
        if tuple(shapes.get(name, ())) != tuple(shape)
    ]
    known = set(architecture.layer_shapes())
    prefix = f"{architecture.family.modules.layers}."

    def covered(rest: str) -> bool:
        index, _, local = rest.partition(".")
        # Old Llama checkpoints carry a buffer of rotary frequencies, which is recomputed from the config.
        computed = local.endswith("rotary_emb.inv_freq") or local in architecture.family.buffers
        return index.isdigit() and int(index) < architecture.n_layers and (local in known or computed)

    problems += [
        mismatch(
            f"{where}: {name}",
            f"only tensors that the family file of {architecture.family.title} covers",
            f"shape {list(shapes[name])}",
            "Its layers hold something that would be lost, so it cannot be pruned.",
        )
        for name in sorted(shapes)
        if name.startswith(prefix) and not covered(name.removeprefix(prefix))
    ]
    if problems:
        raise refusal(problems, where=where, most=20)


def _check_names(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors whose common prefix is not the family's."""
    embedding = f"{architecture.family.modules.embedding}.weight"
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
            "Save the model itself with save_pretrained(), not its wrapper.",
        )


def _check_depth(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a config with another number of layers than the files hold."""
    prefix = f"{architecture.family.modules.layers}."
    local = architecture.layer_shapes()
    split = (name.removeprefix(prefix).partition(".") for name in shapes if name.startswith(prefix))
    found = {int(index) for index, _, name in split if index.isdigit() and name in local}
    # A layer with missing tensors is a different problem.
    whole = all(architecture.tensor_name(layer, name) in shapes for layer in found for name in local)
    if found and whole and len(found) != architecture.n_layers and found == set(range(len(found))):
        field = architecture.family.fields["layers"]
        raise UserError(
            f"{where}: {field} is {architecture.n_layers} in the config, but the files hold {len(found)} layers.",
            f"Use matching config and weights; if the weights are right, set {field} to {len(found)}.",
        )
