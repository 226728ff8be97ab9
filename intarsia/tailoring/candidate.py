"""One point of the search space, as plain data that can be compared, hashed and counted.

All numbers are on grids, so that candidates can be equal. The `Menu` of a family lists the blends of a layer: which
there are, how many, and which are one step apart. Source of the choices: GPTailor, arXiv 2506.20480 (remove, select,
merge), and arXiv 2510.15304 (concatenate).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter

from intarsia.recipe.methods import METHODS
from intarsia.recipe.recipe import MergeMethod

_Values: TypeAlias = Annotated[
    tuple[tuple[str, float], ...],
    BeforeValidator(lambda values: tuple(values.items()) if isinstance(values, dict) else values),
    PlainSerializer(dict),
]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The tensors at one layer index: those of one member of the family, or of several, merged."""

    # In the family's order; without the base for methods that work on differences to it.
    members: tuple[str, ...]
    # None for a single member.
    method: MergeMethod | None = None
    # The method's settings, by name: `lead` (the share of the first member; the others have equal shares of the rest),
    # `lambda` (how much of the difference is added), `density` (how much of a difference is kept), and its own.
    values: _Values = ()


@dataclass(frozen=True, kw_only=True)
class Keep:
    """A layer kept at its index. `mlp` is None if the MLP has the attention's blend; `scale` multiplies its output."""

    attention: Blend
    mlp: Blend | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Join:
    """A layer of member `first` joined with a removed layer after it, of member `second`.

    Either a concatenation with the next layer, or its attention with the MLP of the last removed layer (a half-layer
    drop).
    """

    first: str
    second: str
    # The first layer's share of the pieces; None for a half-layer drop.
    share: float | None = None


Choice: TypeAlias = Keep | Join
Slot: TypeAlias = tuple[int, int]
"""A position, and how often it occurred before: in a stack some positions occur twice."""


def slots(positions: Sequence[int]) -> list[Slot]:
    """The slots of a candidate with these positions."""
    return [(position, positions[:index].count(position)) for index, position in enumerate(positions)]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The choice for each output layer. `positions[i]` is the base's layer for `choices[i]`.

    Positions ascend. A layer that is not among them is removed; in a stack some occur twice. In a space with groups, a
    position is the first layer of a group.
    """

    positions: tuple[int, ...]
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        assert len(self.positions) == len(self.choices)

    def items(self) -> tuple[tuple[int, Choice], ...]:
        """Positions with their choices."""
        return tuple(zip(self.positions, self.choices, strict=True))

    def by_slot(self) -> dict[Slot, Choice]:
        """Choices by slot."""
        return dict(zip(slots(self.positions), self.choices, strict=True))


def single(member: str) -> Keep:
    """A whole layer of one member."""
    return Keep(attention=Blend(members=(member,)))


_CANDIDATES = TypeAdapter(Candidate)


def to_plain(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON values, without defaults; `from_plain` is the inverse."""
    found: dict[str, Any] = _CANDIDATES.dump_python(candidate, mode="json", exclude_defaults=True)
    return found


def from_plain(data: Any) -> Candidate:
    """The candidate of `to_plain`."""
    return _CANDIDATES.validate_python(data)


Plain: TypeAlias = Annotated[Candidate, PlainSerializer(to_plain)]
"""A candidate inside other data."""


_USUAL = {"lead": 0.5, "lambda": 1.0, "density": 0.5}


@dataclass(frozen=True, kw_only=True)
class Menu:
    """The blends of a family.

    Blends that equal a whole layer are excluded: those that add nothing (`lambda` 0), or the whole difference of one
    member (task arithmetic with `lambda` 1).
    """

    # The base is the first.
    members: tuple[str, ...]
    # Whether variants may be taken whole; the base always may.
    select: bool
    # The given methods for which the family has enough members.
    methods: tuple[MergeMethod, ...]
    # The values of each setting of each method, ascending.
    grids: Mapping[MergeMethod, Mapping[str, tuple[float, ...]]]

    def __post_init__(self) -> None:
        sizes = {method: self.sizes(method) for method in self.methods}
        usable = tuple(method for method, (_, least, most) in sizes.items() if least <= most)
        object.__setattr__(self, "methods", usable)

    @property
    def singles(self) -> tuple[str, ...]:
        """The members that may be taken whole."""
        return self.members if self.select else self.members[:1]

    def sizes(self, method: MergeMethod) -> tuple[tuple[str, ...], int, int]:
        """The members that a method may merge, and the least and greatest number of them."""
        kind = METHODS[method]
        pool = self.members[1:] if kind.base else self.members
        least = max(kind.least, 1 if kind.base else 2)
        return pool, least, min(kind.most or len(pool), len(pool))

    def count(self) -> int:
        """The number of blends."""
        total = len(self.singles)
        for method in self.methods:
            pool, least, most = self.sizes(method)
            for size in range(least, most + 1):
                values = math.prod(len(self._values(method, name, size)) for name in self.grids[method])
                total += math.comb(len(pool), size) * values
        return total

    def has(self, blend: Blend) -> bool:
        """Whether the menu has a blend."""
        if blend.method is None:
            return len(blend.members) == 1 and blend.members[0] in self.singles and not blend.values
        if blend.method not in self.methods or blend.members not in self._subsets(blend.method):
            return False
        names = list(self.grids[blend.method])
        return [name for name, _ in blend.values] == names and all(
            value in self._values(blend.method, name, len(blend.members)) for name, value in blend.values
        )

    def random(self, rng: Random) -> Blend:
        """Draw a whole layer or a merge with equal chance; then member or method, members and values uniformly."""
        if not self.methods or rng.random() < 0.5:
            return Blend(members=(rng.choice(self.singles),))
        method = rng.choice(self.methods)
        members = rng.choice(list(self._subsets(method)))
        values = tuple((name, rng.choice(self._values(method, name, len(members)))) for name in self.grids[method])
        return Blend(members=members, method=method, values=values)

    def nearest(self, members: Sequence[str], method: MergeMethod, values: Mapping[str, float]) -> Blend:
        """The blend closest to a wanted one; values that are not given are the defaults.

        Members that the method does not take are ignored. If too few are left, or the whole difference of one member
        is wanted, it is a whole layer.
        """
        pool, least, most = self.sizes(method)
        wanted = tuple(member for member in pool if member in members)[:most]
        if method not in self.methods or len(wanted) < least or not wanted:
            taken = [member for member in self.members if member in members and member in self.singles]
            return Blend(members=(next((m for m in taken if m != self.members[0]), self.members[0]),))
        if self.select and len(wanted) == 1 and _adds_up(method) and values.get("lambda") == 1.0:
            return Blend(members=wanted)
        settled = []
        for name in self.grids[method]:
            target = values.get(name, _USUAL.get(name))
            if target is None:
                target = METHODS[method].parameters[name].default
            grid = self._values(method, name, len(wanted))
            settled.append((name, min(grid, key=lambda value: (abs(value - target), value))))
        return Blend(members=wanted, method=method, values=tuple(settled))

    def source_steps(self, blend: Blend) -> list[Blend]:
        """Blends with another member, one more, or one less."""
        if blend.method is None:
            return [Blend(members=(member,)) for member in self.singles if member not in blend.members]
        others = [
            [other for other in self.members if (other in blend.members) != (other == member)]
            for member in self.members
        ]
        return _unlike(blend, [self.nearest(members, blend.method, dict(blend.values)) for members in others])

    def merge_steps(self, blend: Blend) -> list[Blend]:
        """Blends by another method (or by none), or with a setting one step up or down."""
        if blend.method is None:
            pairs = [(method, (*blend.members, member)) for method in self.methods for member in self.members]
            return _unlike(blend, [self.nearest(members, method, {}) for method, members in pairs])
        values = dict(blend.values)
        found = [self.nearest(blend.members, method, values) for method in self.methods]
        found += [Blend(members=(member,)) for member in blend.members if member in self.singles]
        for name, value in blend.values:
            for near in beside(self._values(blend.method, name, len(blend.members)), value):
                found.append(replace(blend, values=tuple({**values, name: near}.items())))
        return _unlike(blend, found)

    def _subsets(self, method: MergeMethod) -> Iterator[tuple[str, ...]]:
        pool, least, most = self.sizes(method)
        for size in range(least, most + 1):
            yield from combinations(pool, size)

    def _values(self, method: MergeMethod, name: str, size: int) -> tuple[float, ...]:
        grid = self.grids[method][name]
        if name != "lambda":
            return grid
        whole = _adds_up(method) and size == 1
        return tuple(value for value in grid if value != 0.0 and not (whole and value == 1.0))


_Value = TypeVar("_Value")


def beside(grid: Sequence[_Value], value: _Value) -> list[_Value]:
    """The neighbours of a value on a grid."""
    at = grid.index(value)
    return [grid[index] for index in (at - 1, at + 1) if 0 <= index < len(grid)]


def _adds_up(method: MergeMethod) -> bool:
    """Whether it adds unchanged differences, so that the whole difference of one member gives that member."""
    kind = METHODS[method]
    return kind.base and not kind.parameters and tuple(kind.search) == ("lambda",)


def _unlike(blend: Blend, found: Sequence[Blend]) -> list[Blend]:
    return [other for other in dict.fromkeys(found) if other != blend]
