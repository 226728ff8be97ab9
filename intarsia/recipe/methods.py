"""The parameters and conditions of each merge operator, read from its registration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from intarsia import registry
from intarsia.recipe.recipe import MergeMethod

_MOST = 2.0**31 - 1


@dataclass(frozen=True)
class Bounds:
    """The range of a parameter, as in `density: Annotated[float, Bounds(0.0, 1.0, open=True)] = 0.5`."""

    # The smallest value, excluded if `open`, and the largest.
    least: float = -_MOST
    most: float = _MOST
    open: bool = False


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A numeric parameter of an operator."""

    # Its name in the function.
    argument: str
    # Its default.
    default: float
    bounds: Bounds = Bounds()
    # Whether it is a whole number.
    whole: bool = False

    def holds(self, value: object) -> bool:
        """Whether a value is valid."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return self.bounds.least <= value <= self.bounds.most and not (self.bounds.open and value == self.bounds.least)

    def __str__(self) -> str:
        kind, bounds = "a whole number" if self.whole else "a number", self.bounds
        return f"{kind} {'above' if bounds.open else 'from'} {bounds.least:g} {'up ' * bounds.open}to {bounds.most:g}"


@dataclass(frozen=True, kw_only=True)
class Method:
    """The properties of an operator; see `intarsia.registry.merge_op`."""

    function: Callable[..., Any]
    # Whether it works on differences to a base layer.
    base: bool
    # Least and greatest number of sources with a nonzero weight.
    least: int
    most: int | None
    # The condition on weights: "finite", "sum 1", "positive" or "equal".
    weights: str
    # Its parameters, by name.
    parameters: Mapping[str, Parameter]
    # Whether it is random: it has a seed, and gets a generator for each tensor.
    random: bool
    # The searched names, with their ranges.
    search: Mapping[str, tuple[float, float]]
    # The expectation that a combination of parameters violates, if any.
    rule: Callable[[Mapping[str, float]], str | None]
    _settle: Callable[[Mapping[str, float]], Mapping[str, float]] | None = field(default=None)

    def arguments(self, params: Mapping[str, float]) -> dict[str, float]:
        """The keyword arguments for the function."""
        return {parameter.argument: params[name] for name, parameter in self.parameters.items() if parameter.argument}

    def settle(self, searched: Mapping[str, float]) -> dict[str, float]:
        """The parameters for a search's choices, without those of the weights."""
        if self._settle is not None:
            return dict(self._settle(searched))
        known = self.parameters
        return {name: int(x) if known[name].whole else x for name, x in searched.items() if name in known}


class _Methods(Mapping[MergeMethod, Method]):
    """Every registered operator by name."""

    def __getitem__(self, name: MergeMethod) -> Method:
        if name not in registry.merge_ops:
            raise KeyError(name)
        return _method(registry.merge_ops.get(name).object, name)

    def __iter__(self) -> Iterator[MergeMethod]:
        return iter(registry.merge_ops.names)

    def __len__(self) -> int:
        return len(registry.merge_ops.names)


METHODS: Mapping[MergeMethod, Method] = _Methods()


@cache
def _method(function: Callable[..., Any], name: str) -> Method:
    entry = registry.merge_ops.get(name)
    facts = entry.facts
    least, most = facts["sources"]
    parameters = {key.rstrip("_"): _parameter(function, key, default) for key, default in entry.parameters.items()}
    random = parameters.pop("generators", None) is not None
    if random:
        parameters["seed"] = Parameter(argument="", default=0, bounds=Bounds(0, _MOST), whole=True)
    return Method(
        function=function,
        base=facts["needs_base"],
        least=least,
        most=most,
        weights=facts["weights"],
        parameters=parameters,
        random=random,
        search=facts["search"],
        rule=facts["rule"] or (lambda params: None),
        _settle=facts["settle"],
    )


def _parameter(function: Callable[..., Any], argument: str, default: Any) -> Parameter:
    if argument == "generators":
        return Parameter(argument=argument, default=0)
    # Only this parameter's annotation, because those of tensors cannot be read without torch.
    own = SimpleNamespace(__annotations__={argument: function.__annotations__.get(argument, float)})
    hint = get_type_hints(own, globalns=function.__globals__, include_extras=True)[argument]
    bounds = next((fact for fact in get_args(hint) if isinstance(fact, Bounds)), Bounds())
    return Parameter(
        argument=argument, default=default, bounds=bounds, whole=hint is int or get_args(hint)[:1] == (int,)
    )


def with_defaults(name: MergeMethod, given: Mapping[str, float]) -> dict[str, float]:
    """Every parameter of a method, given or default; for an unknown method the given ones."""
    method = METHODS.get(name)
    return {**({key: each.default for key, each in method.parameters.items()} if method else {}), **given}
