"""The methods of merging whole layers: what each needs, and which parameters it has.

What they compute stands in `intarsia.building.merge_operators` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from intarsia.recipe.ops import MergeMethod


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that a method takes."""

    # The value where none is given.
    default: float
    # The smallest value, itself excluded where `open`, and the largest.
    least: float
    most: float
    open: bool = False
    # Whether it is a whole number.
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
    """What a method needs."""

    # Whether it works on differences to a base layer.
    base: bool
    # How many sources may have a weight other than 0.
    least: int = 1
    most: int | None = None
    # What the weights must be: "finite", "sum 1", "positive" or "equal".
    weights: str = "finite"
    # Its parameters, by name.
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
    """Every parameter of a method; its default where it is not given."""
    return {**{name: parameter.default for name, parameter in METHODS[method].parameters.items()}, **given}
