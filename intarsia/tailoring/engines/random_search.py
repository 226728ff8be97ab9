"""Random search: the baseline that every other engine must beat at equal trials.

Candidates are drawn from the whole space; the staged budgets are those of the other engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.engine import Engine, Start
from intarsia.tailoring.engines.hyperband import Stage, Staged
from intarsia.tailoring.space import Space

NAME = "random"


def random_search(space: Space, budgets: Sequence[int], *, eta: int, seed: int, starts: Sequence[Start] = ()) -> Engine:
    """The engine."""

    def propose(stages: Sequence[Stage], rng: Random) -> tuple[Candidate, str]:
        return space.random(rng), "random"

    return Staged(NAME, propose, budgets, eta=eta, seed=seed, starts=starts)
