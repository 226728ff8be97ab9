"""Random search: the baseline that every other engine must beat at equal trials."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from intarsia.registry import engine
from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.engine import Stage, Staged, Task


@engine("random")
class RandomSearch(Staged):
    """Candidates drawn from the whole space, with the staged budgets of the other engines."""

    def __init__(self, task: Task) -> None:
        super().__init__("random", task)

    def propose(self, stages: Sequence[Stage], rng: Random) -> tuple[Candidate, str]:
        """Draw one."""
        return self.space.random(rng), "random"
