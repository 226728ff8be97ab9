"""Check a recipe, on its own and against its models' shapes: all errors at once, before anything is built."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import numpy as np

from intarsia.architecture.spec import Architecture, Part
from intarsia.data_file import refusal, shown
from intarsia.disk import let_go
from intarsia.errors import Problem, mismatch
from intarsia.recipe.methods import METHODS, Method
from intarsia.recipe.recipe import VARIANT_NAME, Concat, Cut, LayerRef, Merge, Mix, NormMode, Op, Recipe, Select

_WEIGHT_TOLERANCE = 1e-6
_PIECES: dict[Part, str] = {"attention": "kv_groups", "mlp": "channels"}


def check(recipe: Recipe, architectures: Mapping[str, Architecture]) -> None:
    """Check that a recipe can be built.

    Args:
        architectures: the architecture of every variant that the recipe uses, by the variant's name.

    Raises:
        UserError: with every problem (at most fifty).
    """
    problems = list(mistakes(recipe))
    base = architectures.get(recipe.base)
    if base is not None:
        problems += _check_shapes(recipe, architectures, base)
        problems += _check_fitted(recipe, base)
    for index, op in enumerate(recipe.layers):
        problems += _check_layer(op, f"layers[{index}]", architectures, base)
    if problems:
        raise refusal(problems, where="recipe")


def mistakes(recipe: Recipe) -> Iterator[Problem]:
    """The problems of a recipe that do not depend on its models."""
    names = [variant.name for variant in recipe.variants]
    for index, name in enumerate(names):
        if not VARIANT_NAME.fullmatch(name):
            yield _problem(f"variants[{index}]", "a name of letters, digits, '_', '-' and '.'", shown(name))
        if name in names[:index]:
            yield _problem(f"variants[{index}]", "a unique name", f"{shown(name)} a second time")
    if recipe.base not in names:
        yield _problem("base", f"one of the variants {', '.join(names)}", shown(recipe.base))
    yield from _check_spans(recipe)
    for index, op in enumerate(recipe.layers):
        base_layer = (op.base,) if isinstance(op, Merge) and op.base is not None else ()
        for variant in {source.variant: None for source in (*op.sources, *base_layer)}:
            if variant not in names:
                yield _problem(f"layers[{index}]", f"a variant among {', '.join(names)}", shown(variant))
        if isinstance(op, Concat):
            yield from _check_concat(op, f"layers[{index}].concat")
        elif isinstance(op, Merge):
            yield from _check_merge(op, f"layers[{index}].merge")


def _problem(where: str, expected: str, found: str, remedy: str = "Correct the recipe.") -> Problem:
    return mismatch(where, expected, found, remedy)


def _check_shapes(recipe: Recipe, architectures: Mapping[str, Architecture], base: Architecture) -> Iterator[Problem]:
    if recipe.depth != base.n_layers:
        yield _problem("depth", f"{base.n_layers}, the depth of {recipe.base!r}", str(recipe.depth))
    for variant in recipe.variants:
        remedy = "Variants must be fine-tunes of one base model."
        for what, ours, theirs in _shape(base, architectures.get(variant.name, base)):
            if ours != theirs:
                yield _problem(f"variants.{variant.name}", f"{what} {ours} as in {recipe.base!r}", str(theirs), remedy)


def _shape(base: Architecture, other: Architecture) -> Iterator[tuple[str, object, object]]:
    yield "family", base.family.name, other.family.name
    if base.family.name != other.family.name:
        return
    for what in ("width", "n_query_heads", "n_kv_heads", "head_dim", "n_channels", "n_experts"):
        yield what, getattr(base, what), getattr(other, what)
    yield "tensors", sorted(base.layer_shapes()), sorted(other.layer_shapes())


def _check_spans(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.layers:
        yield _problem("layers", "at least one layer", "none")
    if len(recipe.spans) != len(recipe.layers):
        yield _problem("spans", f"{len(recipe.layers)} spans, one per layer", str(len(recipe.spans)))
        return
    start = 0
    for index, (first, last) in enumerate(recipe.spans):
        ends = index == len(recipe.spans) - 1
        if first != start or not (recipe.depth if ends else start) <= last <= recipe.depth:
            expected = f"a span from {start} to {'' if ends else 'at most '}{recipe.depth}"
            remedy = "Leave the spans out to have them derived."
            yield _problem(f"spans[{index}]", expected, f"{first}-{last}", remedy)
            return
        start = last


def _check_fitted(recipe: Recipe, base: Architecture) -> Iterator[Problem]:
    for layer, tensors in recipe.fitted.items():
        first = None
        if 0 <= layer < len(recipe.layers):
            first = next(iter(recipe.layers[layer].sources), None)
        else:
            yield _problem(f"fitted.{layer}", f"an output layer from 0 to {len(recipe.layers) - 1}", str(layer))
        shapes = base.layer_shapes(first.layer if first is not None and 0 <= first.layer < base.n_layers else 0)
        for name, tensor in tensors.items():
            where = f"fitted.{layer}.{name}"
            if name not in shapes:
                yield _problem(where, f"one of {', '.join(shapes)}", repr(name))
            elif tuple(tensor.shape) != shapes[name]:
                yield _problem(where, f"shape {list(shapes[name])}", str(list(tensor.shape)))
            elif tensor.dtype != np.float32:
                yield _problem(where, "float32", str(tensor.dtype))
            elif not np.isfinite(tensor).all():
                yield _problem(where, "finite numbers", "NaN or infinity", "Fit it again.")
            let_go(tensor)


def _check_layer(
    op: Op, where: str, architectures: Mapping[str, Architecture], base: Architecture | None
) -> Iterator[Problem]:
    """Check an op; `base` has the shape of the output layer, and is None if the recipe's base is unknown."""
    types: dict[str | None, LayerRef] = {}
    base_layer = (op.base,) if isinstance(op, Merge) and op.base is not None else ()
    for source in (*op.sources, *base_layer):
        architecture = architectures.get(source.variant)
        if architecture is None:
            continue
        if not 0 <= source.layer < architecture.n_layers:
            yield _problem(where, f"a layer from 0 to {architecture.n_layers - 1}", str(source))
        elif architecture.layer_types is not None:
            types.setdefault(architecture.layer_types[source.layer], source)
    if len(types) > 1:
        found = ", ".join(f"{source} is {kind}" for kind, source in types.items())
        yield _problem(where, "sources of one layer type", found, "Join layers of one type only.")
    if base is not None and base.inspected is not None and not isinstance(op, Select):
        reason = f"{type(op).__name__.lower()}, and layers of this model can only be removed: {base.inspected.reason}"
        yield _problem(where, "a whole layer", reason, "Select layers, or leave them out.")
    elif base is not None and isinstance(op, Concat):
        for part, key in _PIECES.items():
            called = f"experts (as {key})" if base.is_mixture(part) else key
            yield from _check_pieces(op.cuts, part, key, f"{where}.concat", base.n_pieces(part), called)


def _check_concat(op: Concat, where: str) -> Iterator[Problem]:
    if op.norm not in get_args(NormMode):
        yield _problem(f"{where}.norm", " or ".join(get_args(NormMode)), repr(op.norm))
    if not op.cuts:
        yield _problem(f"{where}.cuts", "at least one cut", "none")
        return
    seen: dict[LayerRef, int] = {}
    for index, cut in enumerate(op.cuts):
        earlier = seen.setdefault(cut.source, index)
        if earlier != index:
            found, remedy = f"{cut.source}, as in cuts[{earlier}]", "Put all pieces of a layer into one cut."
            yield _problem(f"{where}.cuts[{index}]", "a layer without another cut", found, remedy)
    for part in _PIECES:
        yield from _check_weights(op.cuts, part, where)


def _check_pieces(cuts: Sequence[Cut], part: Part, key: str, where: str, whole: int, called: str) -> Iterator[Problem]:
    for index, cut in enumerate(cuts):
        pieces = cut.pieces(part)
        outside = [piece for piece in pieces if not 0 <= piece < whole]
        place = f"{where}.cuts[{index}].{key}"
        if outside:
            others = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
            yield _problem(place, f"indices from 0 to {whole - 1}", f"{outside[0]}{others}")
        twice = [piece for piece, count in Counter(pieces).items() if count > 1]
        if twice:
            others = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
            yield _problem(place, "every index once", f"{twice[0]} a second time{others}")
    total = sum(len(cut.pieces(part)) for cut in cuts)
    if total != whole:
        yield _problem(where, f"{whole} {called} in all cuts together", str(total), "Add or remove some.")


def _check_weights(cuts: Sequence[Cut], part: Part, where: str) -> Iterator[Problem]:
    weights = [cut.weights.get(part, math.nan) for cut in cuts]
    bad = [index for index, weight in enumerate(weights) if not (math.isfinite(weight) and weight >= 0.0)]
    for index in bad:
        given = part in cuts[index].weights
        found, remedy = str(weights[index]) if given else "none", "Give weights to every cut or to none."
        yield _problem(f"{where}.cuts[{index}].weights.{part}", "a number of at least 0", found, remedy)
    if not bad and abs(math.fsum(weights) - 1.0) > _WEIGHT_TOLERANCE:
        yield _problem(where, f"{part} weights that sum to 1", str(math.fsum(weights)))


def _check_merge(op: Merge, where: str) -> Iterator[Problem]:
    if not op.sources:
        yield _problem(where, "at least one layer", "none")
    mixes = [("", op.mix("attention")), *([(".mlp", op.mlp)] if op.mlp is not None else [])]
    for prefix, mix in mixes:
        yield from _check_mix(mix, len(op.sources), f"{where}{prefix}")
    based = [mix.method for _, mix in mixes if mix.method in METHODS and METHODS[mix.method].base]
    if based and op.base is None:
        yield _problem(f"{where}.base", f"the base layer of the differences of {based[0]}", "none")
    if not based and op.base is not None:
        yield _problem(f"{where}.base", f"no base, because {op.method} takes no differences", str(op.base))
    if not math.isfinite(op.scale):
        yield _problem(f"{where}.scale", "a finite number", str(op.scale))


def _check_mix(mix: Mix, sources: int, where: str) -> Iterator[Problem]:
    method = METHODS.get(mix.method)
    if method is None:
        yield _problem(f"{where}.method", f"one of {', '.join(METHODS)}", shown(mix.method))
    if len(mix.weights) != sources:
        yield _problem(f"{where}.weights", f"{sources} weights, one per layer", str(len(mix.weights)))
        return
    bad = [index for index, weight in enumerate(mix.weights) if not math.isfinite(weight)]
    for index in bad:
        yield _problem(f"{where}.weights[{index}]", "a finite number", str(mix.weights[index]))
    if method is None:
        return
    if not bad:
        yield from _check_mix_weights(mix, method, where)
    for name, value in mix.params.items():
        if name not in method.parameters:
            known = ", ".join(method.parameters) or "none"
            yield _problem(f"{where}.params", f"parameters of {mix.method} ({known})", shown(name))
        elif not method.parameters[name].holds(value):
            yield _problem(f"{where}.params.{name}", str(method.parameters[name]), shown(value))
    missing = [name for name in method.parameters if name not in mix.params]
    for name in missing:
        yield _problem(f"{where}.params", f"{name} of {mix.method}", "none")
    sound = not missing and all(each.holds(mix.params[name]) for name, each in method.parameters.items())
    if sound and (expected := method.rule(mix.params)) is not None:
        yield _problem(f"{where}.params", expected, str(dict(mix.params)))


def _check_mix_weights(mix: Mix, method: Method, where: str) -> Iterator[Problem]:
    weights, found = [weight for weight in mix.weights if weight], ", ".join(f"{weight:g}" for weight in mix.weights)
    if not method.least <= len(weights) <= (method.most or len(weights)):
        wanted = f"exactly {method.least}" if method.most == method.least else f"at least {method.least}"
        yield _problem(
            f"{where}.weights", f"{wanted} layers with a weight other than 0 for {mix.method}", str(len(weights))
        )
    elif method.weights == "sum 1" and (abs(math.fsum(weights) - 1.0) > _WEIGHT_TOLERANCE or min(weights) < 0.0):
        yield _problem(f"{where}.weights", f"weights from 0 to 1 that sum to 1 for {mix.method}", found)
    elif method.weights == "positive" and min(weights) < 0.0:
        yield _problem(f"{where}.weights", f"no negative weight for {mix.method}", found)
    elif method.weights == "equal" and max(weights) - min(weights) > _WEIGHT_TOLERANCE:
        yield _problem(f"{where}.weights", f"equal weights for {mix.method}, which sets its own", found)
