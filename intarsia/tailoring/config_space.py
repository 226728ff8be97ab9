"""The search space in the words of ConfigSpace, which SMAC searches.

Each layer of the base has a flag, `kept` or `removed`, so that the surrogate model sees the subset as such; what is
chosen for a layer is active only where the layer is kept, a method's settings only where the method is chosen, and so
on. Flags that remove too many or too few layers are mended, as are merges of too few members: `candidate` is defined
for every configuration, and `configuration` gives the one that says exactly what a candidate is.

Names: `012.op` is the op of layer 12, `012.mlp.method` the method for its MLP, `012b.op` that of its second copy in a
stack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from intarsia.errors import missing_package
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep
from intarsia.tailoring.space import Space

if TYPE_CHECKING:
    from ConfigSpace import Configuration, ConfigurationSpace

_KEPT = {"cut": ("kept", "removed"), "stack": ("once", "twice")}
_YES, _NO = "yes", "no"


@dataclass(frozen=True, kw_only=True)
class ConfigurationMap:
    """Between configurations and the candidates of a space."""

    space: Space

    def configuration_space(self, seed: int = 0) -> ConfigurationSpace:
        """The space for ConfigSpace.

        Raises:
            UserError: ConfigSpace is not installed.
        """
        try:
            import ConfigSpace
        except ImportError as error:
            raise missing_package("ConfigSpace", where="search", extra="search", error=error) from error
        found = ConfigSpace.ConfigurationSpace(seed=seed)
        writer = _Writer(self.space, ConfigSpace)
        for position in self.space.starts:
            writer.position(position)
        # All at once: ConfigSpace sorts everything anew whenever something is added.
        found.add(*writer.parameters, *writer.conditions)
        return found

    def candidate(self, configuration: Mapping[str, Any]) -> Candidate:
        """The candidate that a configuration means."""
        values = dict(configuration)
        changed = self._changed(values)
        choices: dict[tuple[int, int], Choice] = {}
        for position in self.space.starts:
            choices[position, 0] = self._choice(_name(position), values)
            if position in changed and self.space.kind == "stack":
                choices[position, 1] = self._choice(_name(position, 1), values)
        return self.space.arrange(changed, choices)

    def configuration(self, candidate: Candidate, space: ConfigurationSpace) -> Configuration:
        """A candidate in the words of `space`, which `configuration_space` has made."""
        from ConfigSpace import Configuration

        values: dict[str, Any] = {}
        if self.space.changes:
            usual, other = _KEPT[self.space.kind]
            changed = self.space.changed(candidate.positions)
            values |= {
                f"{_name(layer)}.layer": other if layer in changed else usual for layer in range(self.space.depth)
            }
        for index, (position, choice) in enumerate(candidate.items()):
            values |= self._values(_name(position, candidate.positions[:index].count(position)), choice)
        return Configuration(space, values={name: value for name, value in values.items() if name in space})

    # Reading

    def _changed(self, values: Mapping[str, Any]) -> list[int]:
        """The flagged layers; if they are too many or too few, some are drawn, the same for the same flags."""
        if not self.space.changes:
            return []
        other = _KEPT[self.space.kind][1]
        flagged = [layer for layer in range(self.space.depth) if values.get(f"{_name(layer)}.layer") == other]
        rng = Random(int.from_bytes(hashlib.sha256(repr(flagged).encode()).digest()[:8], "little"))
        if len(flagged) > self.space.changes:
            return sorted(rng.sample(flagged, self.space.changes))
        rest = [layer for layer in range(self.space.depth) if layer not in flagged]
        return sorted([*flagged, *rng.sample(rest, self.space.changes - len(flagged))])

    def _choice(self, name: str, values: Mapping[str, Any]) -> Choice:
        base = self.space.menu.members[0]
        op = values.get(f"{name}.op", "select")
        if op == "concat":
            first = values.get(f"{name}.variant", base)
            return Join(first=first, second=values[f"{name}.second"], share=float(values[f"{name}.share"]))
        attention = self._blend(name, op, values)
        behind = values.get(f"{name}.mlp.op", "same")
        mlp = None if behind == "same" else self._blend(f"{name}.mlp", behind, values)
        scale = float(values.get(f"{name}.scale", 1.0))
        return Keep(attention=attention, mlp=None if mlp == attention else mlp, scale=scale)

    def _blend(self, name: str, op: str, values: Mapping[str, Any]) -> Blend:
        menu = self.space.menu
        if op == "select":
            return Blend(members=(values.get(f"{name}.variant", menu.members[0]),))
        method = values[f"{name}.method"]
        members = [member for member in menu.members if values.get(f"{name}.with.{member}", _NO) == _YES]
        given = {key: float(values[f"{name}.{key}"]) for key in menu.settings_of(method) if f"{name}.{key}" in values}
        return menu.nearest(members, method, given)

    # Writing

    def _values(self, name: str, choice: Choice) -> dict[str, Any]:
        if isinstance(choice, Join):
            return {
                f"{name}.op": "concat",
                f"{name}.variant": choice.first,
                f"{name}.second": choice.second,
                f"{name}.share": choice.share,
            }
        values = {**self._blend_values(name, choice.attention), f"{name}.scale": choice.scale}
        if choice.mlp is None:
            return {**values, f"{name}.mlp.op": "same"}
        return {**values, **self._blend_values(f"{name}.mlp", choice.mlp)}

    def _blend_values(self, name: str, blend: Blend) -> dict[str, Any]:
        if blend.method is None:
            return {f"{name}.op": "select", f"{name}.variant": blend.members[0]}
        members = self.space.menu.pool(blend.method)
        return {
            f"{name}.op": "merge",
            f"{name}.method": blend.method,
            **{f"{name}.with.{member}": _YES if member in blend.members else _NO for member in members},
            **{f"{name}.{key}": value for key, value in blend.values},
        }


def _name(position: int, occurrence: int = 0) -> str:
    return f"{position:03d}{'b' if occurrence else ''}"


class _Writer:
    """Collects the hyperparameters of a space, and the conditions under which each means something."""

    def __init__(self, space: Space, module: Any) -> None:
        self.space, self.module = space, module
        self.parameters: list[Any] = []
        self.conditions: list[Any] = []

    def position(self, position: int) -> None:
        """Everything about one layer (or group)."""
        name = _name(position)
        if not self.space.changes:
            self.layer(name, position, None)
            return
        usual, other = _KEPT[self.space.kind]
        share = self.space.changes / self.space.depth
        flag = self.module.CategoricalHyperparameter(
            f"{name}.layer", [usual, other], weights=[1.0 - share, share], default_value=usual
        )
        self.parameters.append(flag)
        if self.space.kind == "cut":
            self.layer(name, position, (flag, [usual]))
        else:
            self.layer(name, position, None)
            self.layer(_name(position, 1), position, (flag, [other]))

    def layer(self, name: str, position: int, condition: tuple[Any, list[Any]] | None) -> None:
        """What a layer is."""
        joinable = self.space.joinable(position)
        ops = ["select", *(["merge"] if self.space.menu.usable else []), *(["concat"] if joinable else [])]
        op = self.category(f"{name}.op", ops, condition)
        self.blend(name, op, ["select", *(["concat"] if joinable else [])])
        if joinable:
            self.category(f"{name}.second", self.space.menu.singles, (op, ["concat"]))
            self.ordinal(f"{name}.share", self.space.shares, (op, ["concat"]))
        kept = (op, ["select", *(["merge"] if self.space.menu.usable else [])])
        if self.space.separate:
            mlp = self.category(f"{name}.mlp.op", ["same", *(o for o in ops if o != "concat")], kept)
            self.blend(f"{name}.mlp", mlp, ["select"])
        if len(self.space.scales) > 1:
            self.ordinal(f"{name}.scale", self.space.scales, kept, default=1.0)

    def blend(self, name: str, op: Any, whole: list[str]) -> None:
        """Which members, and how they are merged."""
        menu = self.space.menu
        self.category(f"{name}.variant", menu.singles, (op, whole))
        if not menu.usable:
            return
        method = self.category(f"{name}.method", menu.usable, (op, ["merge"]))
        for member in menu.members:
            taking = [other for other in menu.usable if member in menu.pool(other)]
            if taking:
                self.category(f"{name}.with.{member}", [_YES, _NO], (method, taking))
        for key, grid in menu.grids.items():
            having = [other for other in menu.usable if key in menu.settings_of(other)]
            values = tuple(value for value in grid if not (key == "lambda" and value == 0.0))
            if having:
                self.ordinal(f"{name}.{key}", values, (method, having))

    def category(self, name: str, choices: Any, condition: tuple[Any, list[Any]] | None) -> Any:
        """A choice between words; the first one is the default."""
        words = list(choices)
        return self.add(self.module.CategoricalHyperparameter(name, words, default_value=words[0]), condition)

    def ordinal(self, name: str, grid: Any, condition: tuple[Any, list[Any]], default: float | None = None) -> Any:
        """A choice between numbers that have an order; the middle one is the default."""
        values = list(grid)
        middle = values[len(values) // 2] if default is None else default
        return self.add(self.module.OrdinalHyperparameter(name, values, default_value=middle), condition)

    def add(self, parameter: Any, condition: tuple[Any, list[Any]] | None) -> Any:
        """Add a hyperparameter that is active where its parent has one of these values."""
        self.parameters.append(parameter)
        if condition is not None:
            parent, values = condition
            self.conditions.append(self.module.InCondition(parameter, parent, values))
        return parameter
