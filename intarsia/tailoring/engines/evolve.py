"""Evolution: children of the best candidates so far, by crossover and mutation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from intarsia.errors import check
from intarsia.registry import engine
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep, beside, single, slots
from intarsia.tailoring.engine import Stage, Staged, Task, draw_weights, ranked
from intarsia.tailoring.space import Space


@dataclass(frozen=True, kw_only=True)
class EvolveSettings:
    """Options of the evolutionary engine."""

    # Random candidates before the first children.
    initial: int = 8
    # Number of best candidates that become parents.
    parents: int = 5
    # Share of new candidates drawn at random.
    fresh: float = 0.02
    # Share of children with two parents.
    crossover: float = 0.35
    # Probability of another mutation after each one.
    again: float = 0.6

    def __post_init__(self) -> None:
        shares = {"fresh": self.fresh, "crossover": self.crossover, "again": self.again}
        check(
            (self.initial >= 1, f"--initial is {self.initial}; it must be at least 1.", "Give a larger number."),
            (self.parents >= 1, f"--parents is {self.parents}; it must be at least 1.", "Give a larger number."),
            *(
                (0.0 <= share < 1.0, f"--{name} is {share}; it must be a share below 1.", "Give a number from 0 to 1.")
                for name, share in shares.items()
            ),
        )


@engine("evolve", settings=EvolveSettings)
class Evolve(Staged):
    """Evolution over staged budgets."""

    def __init__(self, task: Task, settings: EvolveSettings) -> None:
        super().__init__("evolve", task)
        self.settings = settings

    def propose(self, stages: Sequence[Stage], rng: Random) -> tuple[Candidate, str]:
        """A child of the best candidates under newly drawn weights."""
        known = {candidate for stage in stages for candidate in stage.costs}
        if len(known) < self.settings.initial:
            # The base without some of its middle layers is far better than random candidates of the whole space.
            plain = rng.random() < 0.5
            return (self.space.random_middle(rng), "random middle") if plain else (self.space.random(rng), "random")
        if rng.random() < self.settings.fresh:
            return self.space.random(rng), "random"
        objectives = len(next(iter(next(stage for stage in stages if stage.costs).costs.values())))
        best = self._best(stages, draw_weights(objectives, rng))
        child, origin = _drawn(best, rng), "mutation"
        if len(best) > 1 and rng.random() < self.settings.crossover:
            child, origin = crossover(self.space, child, _drawn(best, rng), rng), "crossover"
        child = mutate(self.space, child, rng)
        while rng.random() < self.settings.again:
            child = mutate(self.space, child, rng)
        return child, origin

    def _best(self, stages: Sequence[Stage], weights: Sequence[float]) -> list[Candidate]:
        """The parents under these weights: the best at the greatest budget, then those at lower ones, each once."""
        found: dict[Candidate, None] = {}
        for stage in reversed(stages):
            # Scores on few examples say little compared with those on many.
            missing = self.settings.parents - len(found)
            found.update(dict.fromkeys(ranked(stage, list(stage.costs), weights)[:missing]))
            if len(found) >= self.settings.parents:
                break
        return list(found)


def _drawn(best: Sequence[Candidate], rng: Random) -> Candidate:
    """The better of two candidates drawn at random."""
    return best[min(rng.randrange(len(best)), rng.randrange(len(best)))]


_EVERYWHERE = 0.2


def mutate(space: Space, candidate: Candidate, rng: Random) -> Candidate:
    """A candidate one random step away: a swap, or a change of source, merge, join or scale, each kind equally likely.

    A step from or to a merge changes one layer, or one time in five all layers with the same choice: what is good for
    one is often good for all, and the effect of one alone is small. A space with a single candidate returns it.
    """
    changed = space.changed(candidate.positions)
    kept = [layer for layer in range(space.depth) if layer not in changed]
    indices = list(range(len(candidate.positions)))
    rng.shuffle(indices)
    kinds = ["swap", "source", "merge", "concat", "scale"]
    rng.shuffle(kinds)
    for kind in kinds:
        if kind == "swap":
            if changed and kept:
                new, choices = rng.choice(kept), candidate.by_slot()
                # The returning layer is the base's, or takes the choice of the layer that it replaces.
                moved = choices.get((new, 0)) if rng.random() < 0.5 else None
                old = rng.choice(changed)
                if moved is not None and space.kind == "prune":
                    choices[old, 0] = moved
                return space.arrange([*(layer for layer in changed if layer != old), new], choices)
            continue
        for index in indices:
            options = layer_steps(space, candidate, index).get(kind, [])
            if options:
                choices, slot = candidate.by_slot(), slots(candidate.positions)[index]
                before, choice = choices[slot], rng.choice(options)
                everywhere = (_is_merged(before) or _is_merged(choice)) and rng.random() < _EVERYWHERE
                alike = [other for other in choices if everywhere and choices[other] == before]
                return space.arrange(changed, choices | dict.fromkeys([slot, *alike], choice))
    return candidate


def crossover(space: Space, first: Candidate, second: Candidate, rng: Random) -> Candidate:
    """A child of two: layers that both remove are removed, and each other layer comes from a parent that has it."""
    ours, theirs = set(space.changed(first.positions)), set(space.changed(second.positions))
    common = sorted(ours & theirs)
    changed = [*common, *rng.sample(sorted(ours ^ theirs), space.changes - len(common))]
    parents = [first.by_slot(), second.by_slot()]
    keys = sorted({*parents[0], *parents[1]})
    choices = {key: rng.choice([parent[key] for parent in parents if key in parent]) for key in keys}
    return space.arrange(changed, choices)


def layer_steps(space: Space, candidate: Candidate, index: int) -> Mapping[str, list[Choice]]:
    """The choices one step away for an output layer, by kind: source, merge, concat, scale."""
    position, choice = candidate.items()[index]
    shares = space.joins(position, candidate.positions)
    if isinstance(choice, Join):
        return _join_steps(space, choice, shares)
    steps: dict[str, list[Choice]] = {
        "source": _keep_steps(space, choice, "source"),
        "merge": _keep_steps(space, choice, "merge"),
        "scale": [replace(choice, scale=scale) for scale in beside(space.scales, choice.scale)],
    }
    if shares:
        plain = choice.mlp is None and choice.attention.method is None and choice.scale == 1.0
        first = choice.attention.members[0] if plain else space.menu.members[0]
        middle = space.shares[len(space.shares) // 2 :][:1]
        usual = [share for share in (*middle, None) if share in shares]
        steps["concat"] = [
            Join(first=first, second=second, share=share) for share in usual for second in space.menu.singles
        ]
    return steps


def _keep_steps(space: Space, choice: Keep, kind: str) -> list[Choice]:
    step = space.menu.source_steps if kind == "source" else space.menu.merge_steps
    mlp = choice.mlp or choice.attention
    pairs: list[tuple[Blend, Blend]] = []
    if choice.mlp is None:
        pairs += [(blend, blend) for blend in step(choice.attention)]
    if space.separate:
        pairs += [(blend, mlp) for blend in step(choice.attention)]
        pairs += [(choice.attention, blend) for blend in step(mlp)]
    return [replace(choice, attention=first, mlp=None if other == first else other) for first, other in pairs]


def _join_steps(space: Space, choice: Join, shares: Sequence[float | None]) -> Mapping[str, list[Choice]]:
    members = space.menu.singles
    sources: list[Choice] = [
        replace(choice, first=first, second=second)
        for first in members
        for second in members
        if (first != choice.first) != (second != choice.second)
    ]
    near: list[Choice] = [replace(choice, share=share) for share in beside(shares, choice.share)]
    return {"source": sources, "concat": [*near, single(choice.first)]}


def _is_merged(choice: Choice) -> bool:
    return isinstance(choice, Keep) and any(blend and blend.method for blend in (choice.attention, choice.mlp))
