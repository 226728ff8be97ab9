"""Evolutionary search: children of the best candidates so far, by the moves of the space.

Each child has parents of its own, drawn by ParEGO's function with weights of its own: from the five candidates that are
best for these weights, the greatest budgets first, the better of two drawn ones. A third of the children have two
parents; every child is then mutated once, or more often with falling chance. One in fifty is not a child but drawn
from the space, so that no part of it is out of reach. The population is all that was scored, so an engine that hears
of other engines' trials breeds from them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.engine import Engine, Start
from intarsia.tailoring.hyperband import Stage, Staged, ranked
from intarsia.tailoring.moves import crossover, mutate
from intarsia.tailoring.scalarise import draw_weights
from intarsia.tailoring.space import Space

NAME = "evolve"
_PARENTS = 5
_FRESH, _CROSSED, _AGAIN = 0.02, 0.35, 0.6
_FIRST = 8
"""So many candidates must have been scored before there are children."""


def evolve(space: Space, budgets: Sequence[int], *, eta: int, seed: int, starts: Sequence[Start] = ()) -> Engine:
    """The engine."""

    def propose(stages: Sequence[Stage], rng: Random) -> tuple[Candidate, str]:
        known = {candidate for stage in stages for candidate in stage.costs}
        if len(known) < _FIRST:
            # The base without some layers of its middle is far better than what is drawn from the whole space.
            plain = rng.random() < 0.5
            return (space.random_middle(rng), "random middle") if plain else (space.random(rng), "random")
        if rng.random() < _FRESH:
            return space.random(rng), "random"
        objectives = len(next(iter(next(stage for stage in stages if stage.costs).costs.values())))
        best = _best(stages, draw_weights(objectives, rng))
        child, origin = _drawn(best, rng), "mutation"
        if len(best) > 1 and rng.random() < _CROSSED:
            child, origin = crossover(space, child, _drawn(best, rng), rng), "crossover"
        child = mutate(space, child, rng)
        while rng.random() < _AGAIN:
            child = mutate(space, child, rng)
        return child, origin

    return Staged(NAME, propose, budgets, eta=eta, seed=seed, starts=starts)


def _best(stages: Sequence[Stage], weights: Sequence[float]) -> list[Candidate]:
    """The parents for these weights: the best at the greatest budget, then those below, each once."""
    found: dict[Candidate, None] = {}
    for stage in reversed(stages):
        # What is known at few examples only says little beside what was scored on many.
        room = _PARENTS - len(found)
        found.update(dict.fromkeys(ranked(stage, list(stage.costs), weights)[:room]))
        if len(found) >= _PARENTS:
            break
    return list(found)


def _drawn(best: Sequence[Candidate], rng: Random) -> Candidate:
    """The better of two."""
    return best[min(rng.randrange(len(best)), rng.randrange(len(best)))]
