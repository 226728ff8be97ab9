"""Warm starts of a search: sensible candidates, and results of earlier searches.

- `random-middle`: the base without random layers of its middle, 8 times.
- a planner's ladder: the layers kept by its recipe at the target depth, once from each member, and once merged from all
  variants by each method of the space. Half-layer drops are kept where the space has them.
- an earlier search: its front; if it used the same examples and family, also all its trials with their budgets. They go
  into the log, do not count as trials of this search, and are not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from pydantic import TypeAdapter

from intarsia.disk import damage_named, write_whole
from intarsia.recipe.recipe import Concat, MergeMethod, Recipe
from intarsia.recipe.schema import content_hash
from intarsia.tailoring.candidate import Blend, Choice, Join, Keep, Menu, Slot, single, slots
from intarsia.tailoring.engine import Start
from intarsia.tailoring.recipes import Translator
from intarsia.tailoring.run import Front, Trial
from intarsia.tailoring.space import Space

_MIDDLES = 8


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Candidates to start with, and trials of earlier searches."""

    starts: tuple[Start, ...] = ()
    earlier: tuple[Trial, ...] = ()

    def save(self, path: Path) -> None:
        """Write it to a file: a resumed search starts with the same."""
        write_whole(path, json.dumps(TypeAdapter(WarmStart).dump_python(self), allow_nan=False) + "\n")

    @classmethod
    def joined(cls, parts: Sequence[WarmStart]) -> WarmStart:
        """Join several, in order."""
        return cls(
            starts=tuple(start for part in parts for start in part.starts),
            earlier=tuple(trial for part in parts for trial in part.earlier),
        )

    @classmethod
    def load(cls, path: Path) -> WarmStart:
        """Read a file of `save`.

        Raises:
            UserError: it is damaged.
        """
        remedy = "The run folder is damaged; search into another one."
        with damage_named(path, expected="the warm start of a search", remedy=remedy):
            return TypeAdapter(cls).validate_json(path.read_text(encoding="utf-8"))


def random_middles(space: Space, seed: int) -> list[Start]:
    """The base without random middle layers; in a fusion the base itself, once."""
    rng = Random(f"middle-{seed}")
    drawn = dict.fromkeys(space.random_middle(rng) for _ in range(_MIDDLES))
    return [Start(candidate=candidate, origin="warm start: random-middle") for candidate in drawn]


def from_recipe(recipe: Recipe, space: Space, name: str) -> list[Start]:
    """The layers that a planner's recipe keeps, from each member, and merged from all variants by each method.

    Nothing, if the space keeps another number of layers.
    """
    if space.kind != "prune" or recipe.depth != space.depth:
        return []
    kept, halves = _kept(recipe, space)
    removed = [layer for layer in range(space.depth) if layer not in kept]
    if len(removed) != space.changes:
        return []
    removed = list(space.removable(removed))
    places = slots(space.positions(removed))
    everywhere = {"": single(space.menu.members[0])}
    everywhere |= {f" on {member}": single(member) for member in space.menu.singles[1:]}
    everywhere |= {f" merged by {method}": Keep(attention=blend) for method, blend in _merged(space.menu)}
    starts = []
    for how, choice in everywhere.items():
        # Half-layers are not merged: beside merged layers they are the base's.
        member = space.menu.members[0] if choice.attention.method else choice.attention.members[0]
        choices: dict[Slot, Choice] = {**dict.fromkeys(places, choice)}
        choices |= {(layer, 0): Join(first=member, second=member) for layer in halves}
        starts.append(Start(candidate=space.arrange(removed, choices), origin=f"warm start: {name}{how}"))
    return starts


def _kept(recipe: Recipe, space: Space) -> tuple[list[int], list[int]]:
    """The base's layers at which a recipe's layers are placed, and those of them with a later layer's MLP.

    Without half-layer drops in the space, this is the layer with the largest share of an op.
    """
    kept, halves, following = list[int](), list[int](), space.depth
    for op in reversed(recipe.layers):
        layer = op.sources[0].layer
        if isinstance(op, Concat):
            attention = [cut.source.layer for cut in op.cuts if cut.kv_groups]
            mlp = [cut.source.layer for cut in op.cuts if cut.channels]
            exact = attention == [layer] and mlp == [following - 1]
            if exact and None in space.joins(layer, [following]):
                halves.append(layer)
            else:
                layer = max(op.cuts, key=lambda cut: len(cut.channels)).source.layer
        kept.append(layer)
        following = layer
    return kept, halves


def _merged(menu: Menu) -> Iterator[tuple[MergeMethod, Blend]]:
    """All variants merged by each method with its defaults; with the base, if a method needs more members."""
    for method in menu.methods:
        variants = menu.nearest(menu.members[1:], method, {})
        blend = variants if variants.method == method else menu.nearest(menu.members, method, {})
        if blend.method == method:
            yield method, blend


def from_search(
    trials: Sequence[Trial], front: Front | None, translator: Translator, name: str, *, same: bool
) -> WarmStart:
    """Take over candidates and trials of an earlier search.

    Args:
        same: whether it had the same examples and family. Even then a trial counts only if its candidate gives the
            same recipe in both searches.
    """
    space = translator.space
    reused = [
        replace(trial, origin=f"{name}, {trial.origin}")
        for trial in trials
        if same
        and trial.status == "ok"
        and space.has(trial.candidate)
        and content_hash(translator.recipe(trial.candidate)) == trial.recipe
    ]
    # A candidate with known costs need not be tried again at the least budget.
    known = {trial.candidate for trial in reused}
    points = [] if front is None else [point.candidate for point in front.points]
    starts = [candidate for candidate in points if space.has(candidate) and candidate not in known]
    return WarmStart(
        starts=tuple(Start(candidate=candidate, origin=f"warm start: {name}") for candidate in starts),
        earlier=tuple(reused),
    )
