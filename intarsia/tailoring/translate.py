"""Candidates become recipes, and recipes candidates.

A recipe that says more than the space can (three layers joined, counts off the grid) has a nearest candidate, which is
the same model where the recipes' hashes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.pruning import scores as allocate
from intarsia.recipe.algebra import concat_of
from intarsia.recipe.methods import METHODS, with_defaults
from intarsia.recipe.recipe import Concat, LayerRef, Merge, Mix, Op, Recipe, Select, Variant, derive_spans
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep, single, slots, usual
from intarsia.tailoring.space import Space

PieceScores = Mapping[LayerRef, Mapping[Part, Tensor]]
"""How sensitive each piece of a layer is, `[P]` for each part: see `intarsia.pruning.scores.piece_scores`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Translator:
    """Between the candidates of a space and recipes.

    Attributes:
        variants: the members of the family, by the names that the space has for them.
        scores: of every layer of every member that may be joined; needed for joins only.
        seed: of the methods that drop entries at random.
    """

    space: Space
    architecture: Architecture
    variants: Sequence[Variant]
    scores: PieceScores
    seed: int = 0

    def recipe(self, candidate: Candidate) -> Recipe:
        """The recipe of a candidate of the space. Variants that it does not use are left out."""
        assert self.space.has(candidate), "a candidate of this space"
        ops = [
            self._op(choice, layer)
            for position, choice in candidate.items()
            for layer in self.space.layers_of(position)
        ]
        used = {self.space.menu.members[0]}
        for op in ops:
            used |= {source.variant for source in op.sources}
        return Recipe(
            variants=tuple(variant for variant in self.variants if variant.name in used),
            base=self.space.menu.members[0],
            depth=self.space.depth,
            layers=tuple(ops),
            spans=derive_spans(ops, self.space.depth),
        )

    # From choices to ops

    def _op(self, choice: Choice, layer: int) -> Op:
        if isinstance(choice, Join):
            return self._joined(choice, layer)
        if choice.mlp is None and choice.attention.method is None and choice.scale == 1.0:
            return Select(source=LayerRef(variant=choice.attention.members[0], layer=layer))
        blends = [choice.attention, *([] if choice.mlp is None else [choice.mlp])]
        members = [name for name in self.space.menu.members if any(name in blend.members for blend in blends)]
        mixes = [self._mix(blend, members) for blend in blends]
        base = LayerRef(variant=self.space.menu.members[0], layer=layer)
        return Merge(
            sources=tuple(LayerRef(variant=name, layer=layer) for name in members),
            weights=mixes[0].weights,
            method=mixes[0].method,
            params=mixes[0].params,
            base=base if any(METHODS[mix.method].base for mix in mixes) else None,
            scale=choice.scale,
            mlp=None if choice.mlp is None else mixes[1],
        )

    def _mix(self, blend: Blend, members: Sequence[str]) -> Mix:
        """A blend as weights for these members, of which it may leave some out, and parameters."""
        method = blend.method or "linear"
        kind, values, count = METHODS[method], dict(blend.values), len(blend.members)
        own = [1.0] * count
        if "lead" in values:
            own = blend.shares
        elif "lambda" in values and "lambda" not in kind.parameters:
            own = [values["lambda"]] * count
        params = kind.settle(values)
        if kind.random:
            params["seed"] = self.seed
        by_member = dict(zip(blend.members, own, strict=True))
        weights = tuple(by_member.get(name, 0.0) for name in members)
        return Mix(weights=weights, method=method, params=with_defaults(method, params))

    def _joined(self, choice: Join, layer: int) -> Op:
        """Concatenation as in CoMe: the most sensitive pieces of each, norms folded in."""
        refs = [LayerRef(variant=choice.first, layer=layer), LayerRef(variant=choice.second, layer=layer + 1)]
        totals = {part: self.architecture.n_pieces(part) for part in PARTS}
        shares = [choice.share, 1.0 - choice.share]
        counts = {part: allocate.counts(shares, totals[part]) for part in PARTS}
        kept = [
            {part: allocate.top(self.scores[ref][part], counts[part][index]) for part in PARTS}
            for index, ref in enumerate(refs)
        ]
        return concat_of(
            [Select(source=ref) for ref in refs],
            kept,
            weights=[{part: counts[part][index] / totals[part] for part in PARTS} for index in range(2)],
            norm="fold",
            architecture=self.architecture,
        )

    # From recipes to candidates

    def nearest(self, recipe: Recipe) -> Candidate | None:
        """The candidate closest to a recipe; None where its layers are not those of any candidate.

        Variants are the same where their hashes are, or else where they are found. A recipe of none of them (say, a
        planner's, of a variant that was merged into a folder of its own) still says which layers of the base to keep.
        """
        names = {variant.name: self._member(variant) for variant in recipe.variants}
        if not any(names.values()):
            names = dict.fromkeys(names, self.variants[0].name)
        refs = {source for op in recipe.layers for source in op.sources}
        if recipe.depth != self.space.depth or len(recipe.layers) != self.space.target:
            return None
        if any(names.get(ref.variant) is None for ref in refs):
            return None
        known = {name: member for name, member in names.items() if member is not None}
        positions = [_weightiest(op).layer for op in recipe.layers]
        changed = self.space.changed(positions)
        fusion = self.space.kind == "fusion"
        whole = tuple(range(self.space.depth)) if fusion else self.space.positions(changed)
        if tuple(positions) != whole or len(changed) != self.space.changes:
            return None
        places = zip(slots(positions), recipe.layers, strict=True)
        found = {slot: self._choice(op, known) for slot, op in places if slot[0] in self.space.starts}
        return self.space.arrange(changed, found)

    @cached_property
    def _members(self) -> Mapping[str, str]:
        keys = {variant.sha256: variant.name for variant in self.variants if variant.sha256}
        return {**{variant.model: variant.name for variant in self.variants}, **keys}

    def _member(self, variant: Variant) -> str | None:
        return self._members.get(variant.sha256 or variant.model)

    def _choice(self, op: Op, names: Mapping[str, str]) -> Choice:
        menu = self.space.menu
        if isinstance(op, Select):
            return single(self._single(names[op.source.variant]))
        if isinstance(op, Merge):
            attention, mlp = (self._blend(op, op.mix(part), names) for part in PARTS)
            scale = min(self.space.scales, key=lambda value: abs(value - op.scale))
            return Keep(attention=attention, mlp=mlp if self.space.separate else None, scale=scale)
        sizes = {cut.source: len(cut.channels) for cut in op.cuts}
        first = _weightiest(op)
        after = [ref for ref in sizes if ref.layer == first.layer + 1]
        if not self.space.shares or not after:
            return single(self._single(names[first.variant]))
        second = max(after, key=lambda ref: sizes[ref])
        share = sizes[first] / (sizes[first] + sizes[second])
        members = [self._single(names[ref.variant]) for ref in (first, second)]
        assert set(members) <= set(menu.members)
        nearest = min(self.space.shares, key=lambda value: (abs(value - share), value))
        return Join(first=members[0], second=members[1], share=nearest)

    def _single(self, member: str) -> str:
        return member if member in self.space.menu.singles else self.space.menu.members[0]

    def _blend(self, op: Merge, mix: Mix, names: Mapping[str, str]) -> Blend:
        counted = [(names[ref.variant], weight) for ref, weight in zip(op.sources, mix.weights, strict=True) if weight]
        order = self.space.menu.members
        counted.sort(key=lambda entry: order.index(entry[0]))
        members = [name for name, _ in counted] or [order[0]]
        if mix.method == "linear" and len(members) == 1:
            return Blend(members=(self._single(members[0]),))
        first = counted[0][1] if counted else 1.0
        whole = sum(weight for _, weight in counted) or 1.0
        values = {"lead": first / whole, "lambda": mix.params.get("lambda", first)}
        return self.space.menu.nearest(members, mix.method, {**self._searched(mix), **values})

    def _searched(self, mix: Mix) -> dict[str, float]:
        """What a search would have chosen for these parameters."""
        kind, found = METHODS[mix.method], dict[str, float]()
        for name, grid in self.space.menu.grids.get(mix.method, {}).items():
            if name in kind.parameters:
                found[name] = mix.params[name]
            elif name not in ("lead", "lambda"):
                rest = {other: usual(mix.method, other) for other in kind.search if other != name}
                found[name] = min(grid, key=lambda value: _distance(kind.settle({**rest, name: value}), mix.params))
        return found


def _distance(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    return sum(abs(value - second[name]) for name, value in first.items())


def _weightiest(op: Op) -> LayerRef:
    """The source at whose layer an op stands: a join's first layer, else the one that gives most."""
    if not isinstance(op, Concat):
        return op.sources[0]
    cuts = sorted(op.cuts, key=lambda cut: cut.source.layer)
    if len(cuts) == 2 and cuts[1].source.layer == cuts[0].source.layer + 1:
        return cuts[0].source
    return max(cuts, key=lambda cut: len(cut.channels)).source
