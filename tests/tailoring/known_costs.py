"""A scorer whose costs are a known function of the recipe, so that what a search finds can be checked by hand."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from intarsia.recipe.recipe import Recipe
from intarsia.recipe.schema import content_hash
from intarsia.tailoring.evaluator import Outcome
from intarsia.tailoring.trial_run import TrialFailed

OBJECTIVES = ("early", "late")


def true_costs(recipe: Recipe) -> tuple[float, float]:
    """`early` counts what is missing of the first layers, `late` of the last ones.

    Every even layer should be math's alone and every odd one code's; each that is not costs 0.1.
    """
    kept = {source.layer for op in recipe.layers for source in op.sources}
    missing = [layer for layer in range(recipe.depth) if layer not in kept]
    wrong = sum({source.variant for source in op.sources} != {_wish(op.sources[0].layer)} for op in recipe.layers)
    early = sum(recipe.depth - layer for layer in missing) / recipe.depth + 0.1 * wrong
    late = sum(layer + 1 for layer in missing) / recipe.depth + 0.1 * wrong
    return early, late


def _wish(layer: int) -> str:
    return "math" if layer % 2 == 0 else "code"


def noise(recipe: Recipe, budget: int) -> float:
    """Less on more examples; the same for the same recipe and budget."""
    digest = hashlib.sha256(f"{content_hash(recipe)}-{budget}".encode()).digest()
    return (digest[0] / 255.0 - 0.5) / budget


@dataclass(kw_only=True)
class Known:
    """Scores by `true_costs`. `fails` gives the reason why a trial fails, if it does."""

    fails: Callable[[Recipe, int], str | None] = lambda recipe, budget: None
    scored: list[tuple[str, int]] = field(default_factory=list)

    def evaluate(self, recipe: Recipe, budget: int) -> Outcome:
        self.scored.append((content_hash(recipe), budget))
        reason = self.fails(recipe, budget)
        if reason is not None:
            raise TrialFailed(reason)
        wobble = noise(recipe, budget)
        costs = tuple(cost + wobble for cost in true_costs(recipe))
        return Outcome(costs=costs, examples=(budget, budget), layer_forwards=float(len(recipe.layers)), seconds=0.01)

    def close(self) -> None:
        self.scored.clear()


@dataclass(frozen=True, kw_only=True)
class OpenKnown:
    """Opens a scorer in a worker."""

    def __call__(self, worker: str) -> Known:
        return Known()


@dataclass(frozen=True, kw_only=True)
class OpenDeadly:
    """A scorer whose process dies at the recipe of that hash: the first time only, or `always`."""

    recipe: str
    mark: Path
    always: bool = False

    def __call__(self, worker: str) -> Known:
        def dies(recipe: Recipe, budget: int) -> None:
            if content_hash(recipe) == self.recipe and (self.always or not self.mark.exists()):
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        return Known(fails=dies)
