"""The methods of merging whole layers: what each needs, and which parameters it has.

What they compute stands in `intarsia.building.merging` and its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from intarsia.recipe.ops import Merge, MergeMethod, Mix

_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number between `least` (left out where `open`) and `most`."""

    default: float
    least: float
    most: float
    open: bool = False
    whole: bool = False

    def holds(self, value: object) -> bool:
        """Whether a value may stand here."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return self.least <= value <= self.most and not (self.open and value == self.least)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.open else 'from'} {self.least:g} {'up ' if self.open else ''}to {self.most:g}"


@dataclass(frozen=True, kw_only=True)
class Method:
    """`base`: it works on differences to a base layer. `least` to `most` sources count (have a weight other than 0)."""

    base: bool
    least: int = 1
    most: int | None = None
    weights: str = "finite"  # or "sum 1", "positive", "equal"
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


_DENSITY = Parameter(default=0.5, least=0.0, most=1.0, open=True)
_LAMBDA = Parameter(default=1.0, least=-100.0, most=100.0)
_SEED = Parameter(default=0, least=0, most=2**31 - 1, whole=True)

METHODS: Mapping[MergeMethod, Method] = {
    "linear": Method(base=False),
    "slerp": Method(base=False, least=2, most=2, weights="sum 1"),
    "task_arithmetic": Method(base=True),
    "ties": Method(
        base=True,
        weights="positive",
        parameters={"density": Parameter(default=0.2, least=0.0, most=1.0, open=True), "lambda": _LAMBDA},
    ),
    "dare_linear": Method(base=True, parameters={"density": _DENSITY, "seed": _SEED}),
    "dare_ties": Method(
        base=True, weights="positive", parameters={"density": _DENSITY, "lambda": _LAMBDA, "seed": _SEED}
    ),
    "breadcrumbs": Method(
        base=True,
        parameters={
            "bottom": Parameter(default=0.85, least=0.0, most=1.0),
            "top": Parameter(default=0.01, least=0.0, most=1.0),
        },
    ),
    "model_stock": Method(base=True, least=2, weights="equal"),
}


def with_defaults(method: MergeMethod, given: Mapping[str, float]) -> dict[str, float]:
    """Every parameter of a method, those that are not given at their defaults."""
    return {**{name: parameter.default for name, parameter in METHODS[method].parameters.items()}, **given}


def merge_faults(op: Merge) -> Iterator[tuple[str, str, str]]:
    """What is wrong with a merge: the place inside it, what is expected there, and what was found."""
    if not op.sources:
        yield "", "at least one layer", "none"
    mixes = [("", op.mix("attention")), *([("mlp.", op.mlp)] if op.mlp is not None else [])]
    for prefix, mix in mixes:
        for place, expected, found in _mix_faults(mix, len(op.sources)):
            yield f"{prefix}{place}", expected, found
    based = [mix.method for _, mix in mixes if mix.method in METHODS and METHODS[mix.method].base]
    if based and op.base is None:
        yield "base", f"the layer that {based[0]} takes differences to", "none"
    if not based and op.base is not None:
        yield "base", f"no base, for {op.method} takes no differences", str(op.base)
    if not math.isfinite(op.scale):
        yield "scale", "a finite number", str(op.scale)


def _mix_faults(mix: Mix, sources: int) -> Iterator[tuple[str, str, str]]:
    method = METHODS.get(mix.method)
    if method is None:
        yield "method", f"one of {', '.join(METHODS)}", repr(mix.method)
    if len(mix.weights) != sources:
        yield "weights", f"{sources} weights, one a layer", str(len(mix.weights))
        return
    bad = [index for index, weight in enumerate(mix.weights) if not math.isfinite(weight)]
    for index in bad:
        yield f"weights[{index}]", "a finite number", str(mix.weights[index])
    if method is None:
        return
    if not bad:
        yield from _weight_faults(mix, method)
    for name, value in mix.params.items():
        if name not in method.parameters:
            known = ", ".join(method.parameters) or "none"
            yield "params", f"parameters of {mix.method} ({known})", repr(name)
        elif not method.parameters[name].holds(value):
            yield f"params.{name}", str(method.parameters[name]), repr(value)
    for name in method.parameters:
        if name not in mix.params:
            yield "params", f"{name} of {mix.method}", "none"
    if mix.method == "breadcrumbs" and not sum(mix.params.get(name, 0.0) for name in ("bottom", "top")) < 1.0:
        yield "params", "bottom and top that leave something (below 1 together)", str(dict(mix.params))


def _weight_faults(mix: Mix, method: Method) -> Iterator[tuple[str, str, str]]:
    weights = [weight for weight in mix.weights if weight]
    if mix.method != "linear" and not method.least <= len(weights) <= (method.most or len(weights)):
        wanted = f"exactly {method.least}" if method.most == method.least else f"at least {method.least}"
        yield "weights", f"{wanted} layers with a weight other than 0 for {mix.method}", str(len(weights))
    elif method.weights == "sum 1" and (abs(math.fsum(weights) - 1.0) > _TOLERANCE or min(weights) < 0.0):
        yield "weights", f"weights from 0 to 1 that sum to 1 for {mix.method}", _shown(mix.weights)
    elif method.weights == "positive" and min(weights) < 0.0:
        yield "weights", f"no negative weight for {mix.method}", _shown(mix.weights)
    elif method.weights == "equal" and max(weights) - min(weights) > _TOLERANCE:
        yield "weights", f"equal weights for {mix.method}, which sets its own", _shown(mix.weights)


def _shown(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)
