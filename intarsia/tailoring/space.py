"""The search space: its candidates, their number, and their neighbours.

The removed layers are encoded as a subset of the base's layers, never as a sequence of indices; so are the layers that
occur twice in a stack. A kept layer may be joined with a removed one after it, or take the MLP of the last layer
removed after it. Everything else about a layer is chosen from the menu. In a space with groups (layer-wise fusion at
full depth), the layers of a group share a choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Literal

from intarsia.architecture.spec import Architecture
from intarsia.errors import Problem, Problems, UserError
from intarsia.recipe.methods import METHODS
from intarsia.recipe.recipe import MergeMethod
from intarsia.tailoring.candidate import Candidate, Choice, Join, Keep, Menu, Slot, single, slots

if TYPE_CHECKING:
    from intarsia.tailoring.family_file import FamilyFile, Range


@dataclass(frozen=True, kw_only=True)
class Space:
    """All candidates of one search."""

    # Layers of the base, and of the result: fewer in a cut, equally many in a fusion, more in a stack.
    depth: int
    target: int
    menu: Menu
    # Possible shares of the first layer in a join; empty if layers are not joined.
    shares: tuple[float, ...] = ()
    # Whether a kept layer may take the MLP of the last layer removed after it, which drops everything between.
    half_layers: bool = False
    # Output scales of kept layers, ascending, 1 among them.
    scales: tuple[float, ...] = (1.0,)
    # Whether attention and MLP of a layer may be blended differently.
    separate: bool = False
    # In a fusion, the number of groups of adjacent layers; None for single layers.
    groups: int | None = None
    # The attention type of each layer, if the family has several; only layers of one type are joined.
    layer_types: tuple[str, ...] | None = None
    # Whether some of the base's layers make a valid model.
    possible: Callable[[Sequence[int]], bool] = field(default=lambda layers: True, compare=False)

    def __post_init__(self) -> None:
        assert 1 <= self.target <= 2 * self.depth and 1.0 in self.scales
        assert self.groups is None or (self.kind == "fusion" and 1 <= self.groups <= self.depth)

    @property
    def kind(self) -> Literal["prune", "fusion", "stack"]:
        """The kind of search, by the change of depth."""
        return "prune" if self.target < self.depth else "fusion" if self.target == self.depth else "stack"

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The positions that a candidate may have: every layer, or the first one of each group."""
        groups = self.depth if self.groups is None else self.groups
        return tuple(index * self.depth // groups for index in range(groups))

    def layers_of(self, position: int) -> range:
        """The layers of the base at a position."""
        at = self.starts.index(position)
        return range(position, self.starts[at + 1] if at + 1 < len(self.starts) else self.depth)

    @cached_property
    def log10_size(self) -> float:
        """The number of candidates, as a power of ten."""
        keeps = self.menu.count() ** (2 if self.separate else 1) * len(self.scales)
        if self.kind != "prune":
            layers = len(self.starts) if self.kind == "fusion" else self.target
            return math.log10(math.comb(self.depth, self.changes)) + layers * math.log10(keeps)
        members = len(self.menu.singles) ** 2
        # For each kept layer and number of removed layers after it: the number of choices from that layer on.
        counts = {self.depth: [1] + [0] * self.changes}
        for layer in reversed(range(self.depth)):
            runs = range(min(self.changes, self.depth - 1 - layer) + 1)
            own = [keeps + members * len(self.joins(layer, [layer + run + 1])) for run in runs]
            counts[layer] = [
                sum(own[run] * counts[layer + run + 1][left - run] for run in runs if run <= left)
                for left in range(self.changes + 1)
            ]
        return math.log10(sum(counts[first][self.changes - first] for first in range(self.changes + 1)))

    def joins(self, layer: int, positions: Sequence[int]) -> tuple[float | None, ...]:
        """The shares at which a layer may be joined with the removed layers after it, before the next position."""
        removed = self.removed_after(layer, positions)
        if self.kind != "prune" or not removed:
            return ()
        halves = (None,) if self.half_layers and self._alike(layer, layer + removed) else ()
        return (*(self.shares if self._alike(layer, layer + 1) else ()), *halves)

    def removed_after(self, layer: int, positions: Sequence[int]) -> int:
        """The number of layers between a layer and the next of these positions."""
        return min((other for other in positions if other > layer), default=self.depth) - layer - 1

    def _alike(self, first: int, second: int) -> bool:
        return self.layer_types is None or self.layer_types[first] == self.layer_types[second]

    def changed(self, positions: Sequence[int]) -> tuple[int, ...]:
        """The removed layers, or in a stack those that occur twice."""
        if self.kind == "stack":
            return tuple(layer for layer in range(self.depth) if list(positions).count(layer) == 2)
        return tuple(layer for layer in range(self.depth) if layer not in positions) if self.kind == "prune" else ()

    @property
    def changes(self) -> int:
        """The number of layers that are removed, or occur twice."""
        return abs(self.depth - self.target)

    def positions(self, changed: Sequence[int]) -> tuple[int, ...]:
        """The positions of a candidate without these layers, or with these twice."""
        if self.kind == "stack":
            return tuple(layer for layer in range(self.depth) for _ in range(2 if layer in changed else 1))
        return tuple(layer for layer in self.starts if layer not in changed)

    def removable(self, wanted: Sequence[int]) -> Sequence[int]:
        """The layers to remove; if the base requires some of them, the nearest possible ones instead.

        Raises:
            UserError: no such number of layers can be removed.
        """
        whole, found = range(self.depth), list[int]()
        if self.kind != "prune" or self.possible([layer for layer in whole if layer not in wanted]):
            return wanted
        nearest = sorted(whole, key=lambda layer: min(abs(layer - other) for other in wanted))
        for _ in wanted:
            tried = ([*found, layer] for layer in nearest if layer not in found)
            fits = (gone for gone in tried if self.possible([layer for layer in whole if layer not in gone]))
            found = next(fits, found)
        if len(found) < len(wanted):
            raise UserError(
                f"No {len(wanted)} of the {self.depth} layers can be removed together.",
                "Remove fewer: every kind of layer must stay, and the config must be able to describe the model.",
            )
        return sorted(found)

    def plain(self, changed: Sequence[int] = ()) -> Candidate:
        """The base's own layers, without these, or with these twice."""
        return self.arrange(changed, {})

    def arrange(self, changed: Sequence[int], choices: Mapping[Slot, Choice]) -> Candidate:
        """A candidate from the removed (or doubled) layers and choices by slot.

        A position without a choice is the base's layer; an impossible join becomes its first layer, whole.
        """
        positions = self.positions(self.removable(changed))
        base = single(self.menu.members[0])
        found: list[Choice] = []
        for slot in slots(positions):
            choice = choices.get(slot, base)
            if isinstance(choice, Join) and choice.share not in self.joins(slot[0], positions):
                choice = single(choice.first)
            elif isinstance(choice, Keep) and choice.mlp == choice.attention:
                choice = Keep(attention=choice.attention, scale=choice.scale)
            found.append(choice)
        return Candidate(positions=positions, choices=tuple(found))

    def has(self, candidate: Candidate) -> bool:
        """Whether a candidate belongs to the space, in its canonical form."""
        changed = self.changed(candidate.positions)
        if len(changed) != self.changes or candidate.positions != self.positions(changed):
            return False
        return all(self._has_choice(choice, at, candidate.positions) for at, choice in candidate.items())

    def _has_choice(self, choice: Choice, position: int, positions: Sequence[int]) -> bool:
        if isinstance(choice, Join):
            members = {choice.first, choice.second} <= set(self.menu.singles)
            return members and choice.share in self.joins(position, positions)
        blends = [choice.attention, *([choice.mlp] if choice.mlp is not None else [])]
        apart = choice.mlp is None or (self.separate and choice.mlp != choice.attention)
        return apart and choice.scale in self.scales and all(self.menu.has(blend) for blend in blends)

    def random(self, rng: Random) -> Candidate:
        """Draw layers uniformly; each is kept or, if possible, joined with equal chance."""
        changed = rng.sample(range(self.depth), self.changes)
        positions = self.positions(changed)
        choices: dict[Slot, Choice] = {}
        for slot in slots(positions):
            shares = self.joins(slot[0], positions)
            if shares and rng.random() < 0.5:
                first, second = rng.choice(self.menu.singles), rng.choice(self.menu.singles)
                choices[slot] = Join(first=first, second=second, share=rng.choice(shares))
            else:
                mlp = self.menu.random(rng) if self.separate else None
                choices[slot] = Keep(attention=self.menu.random(rng), mlp=mlp, scale=rng.choice(self.scales))
        return self.arrange(changed, choices)

    def random_middle(self, rng: Random) -> Candidate:
        """The base without random layers of its middle: avoid the first and last tenth, as far as possible.

        A stack draws the doubled layers like this; a fusion starts from the base.
        """
        spare = max(min(self.depth // 10, (self.depth - self.changes) // 2), 0)
        return self.plain(rng.sample(range(spare, self.depth - spare), self.changes))


_STEP, _FINE = 0.1, 0.05
_POINTS = 10  # in the range of an operator's own option


def grid(ends: Range, step: float) -> tuple[float, ...]:
    """The multiples of `step` in a range, and its ends; ascending, rounded to six decimals."""
    low, high = ends
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    inside = [round(index * step, 6) for index in range(first, last + 1)]
    return tuple(sorted({round(low, 6), round(high, 6), *inside}))


def target_layers(file: FamilyFile, architecture: Architecture, parameters: int | None = None) -> int:
    """The target depth; for a sparsity, the greatest depth that removes at least that share of the parameters.

    Args:
        parameters: of the base; None if only its config is known, which gives all but those of the last norm.
    """
    if file.target.layers is not None:
        return file.target.layers
    assert file.target.sparsity is not None, "a family file has a target"
    embeddings = architecture.vocabulary * architecture.width * (1 if architecture.tied else 2)
    layers = architecture.n_layers * architecture.layer_parameters
    share = architecture.layer_parameters / (parameters or layers + embeddings)
    return architecture.n_layers - math.ceil(file.target.sparsity / share - 1e-9)


def space_of(file: FamilyFile, architecture: Architecture, parameters: int | None = None) -> Space:
    """The space that a family.yaml describes, for a base of this architecture.

    Raises:
        UserError: its operations cannot reach the target, or an operation has nothing to work on.
    """
    from intarsia.inspection.structure import Possible  # which imports torch

    depth = architecture.n_layers
    target = target_layers(file, architecture, parameters)
    found = _misfits(file, architecture, target)
    Problems(Problem(f"Family file: {message}.", hint) for message, hint in found).raise_any()
    menu = Menu(
        members=tuple(file.members),
        select="select" in file.operations,
        methods=file.methods,
        grids={method: _grids(method, file) for method in file.methods},
    )
    if file.methods and not menu.methods:
        raise UserError(
            f"Family file: no method of merge.methods ({', '.join(file.methods)}) takes {len(file.variants)} variants.",
            "Add variants, or choose other methods.",
        )
    space = Space(
        depth=depth,
        target=target,
        menu=menu,
        shares=grid(file.concat.share, _STEP) if "concat" in file.operations else (),
        half_layers="half-layers" in file.operations,
        scales=tuple(sorted({1.0, *grid(file.output_scale, _FINE)})),
        separate=file.merge.parts == "separate",
        groups=file.fusion.groups,
        layer_types=architecture.layer_types,
        possible=Possible(architecture),
    )
    space.removable(range(space.changes))
    return space


def _grids(method: MergeMethod, file: FamilyFile) -> dict[str, tuple[float, ...]]:
    """The grids of an operator's parameters: in the ranges of the family file, or else in its own."""
    kind, found = METHODS[method], dict[str, tuple[float, ...]]()
    for name, own in kind.search.items():
        asked = {"lambda": file.merge.scale, "density": file.merge.density}.get(name)
        if name in ("lead", "lambda", "density"):
            values = grid(asked or own, _STEP)
        else:
            step = (own[1] - own[0]) / _POINTS
            values = tuple(dict.fromkeys(round(own[0] + index * step, 6) for index in range(_POINTS + 1)))
        whole = name in kind.parameters and kind.parameters[name].whole
        found[name] = tuple(sorted({float(round(value)) for value in values})) if whole else values
    return found


def _misfits(file: FamilyFile, architecture: Architecture, target: int) -> Iterator[tuple[str, str]]:
    """Each contradiction in the family file, and a hint."""
    depth = architecture.n_layers
    inner = [name for name in file.operations if name not in ("remove", "select")]
    inner += ["output_scale"] * (file.output_scale != (1.0, 1.0))
    if inner and architecture.inspected is not None:
        reason = f"layers of this model can only be removed: {architecture.inspected.reason}"
        yield f"{', '.join(inner)}: {reason}", "Search with remove, and select where there are variants."
    name = "layers" if file.target.layers is not None else "sparsity"
    asked = f"target.{name} is {getattr(file.target, name)}"
    if target < 1:
        yield f"{asked}; at least one of {depth} layers must stay", "Ask for less."
    elif target < depth and "remove" not in file.operations:
        yield f"{asked}; the base has {depth} layers, and 'remove' is not among the operations", "Add remove."
    elif target > depth and "stack" not in file.operations:
        yield f"{asked}; the base has {depth} layers, and 'stack' is not among the operations", "Add stack."
    elif target > 2 * depth:
        yield f"{asked}; a layer occurs twice at most, so {2 * depth} is the most", "Ask for fewer layers."
    if "stack" in file.operations and target <= depth:
        yield f"'stack' is among the operations, and the target is {target} of {depth} layers", "Remove it."
    joins = [name for name in ("concat", "half-layers") if name in file.operations]
    if joins and target >= depth:
        yield f"{joins[0]!r} is among the operations, and no layer is removed", "Remove it."
    groups = file.fusion.groups
    if groups is not None and target != depth:
        yield f"fusion.groups is {groups}, and the target is {target} of {depth} layers", "Remove the groups."
    elif groups is not None and groups > depth:
        yield f"fusion.groups is {groups}; the base has {depth} layers", "Use fewer groups."
    if not file.variants and {"select", "merge"} & set(file.operations) and not joins:
        yield "there are no variants to select or merge", "Add one, or search with remove alone."
    if file.merge.scale == (0.0, 0.0) and file.methods:
        yield "merge.scale is 0, which adds nothing", "Widen the range."
