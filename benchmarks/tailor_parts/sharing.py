"""What trials of a search share with those before them: what was run, and the least that would have to be.

Examples are run in segments between two budgets. A trial needs a layer on a segment unless an earlier one, or itself at
a lower budget, has run the same layers up to there on it. A cache without bounds would save all of these; the search's
own has a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intarsia.tailoring.candidate import Candidate, Choice
from intarsia.tailoring.run import Trial

Path = tuple[tuple[int, Choice], ...]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Layers over examples: run by the search, the least with a cache without bounds, and with no sharing at all."""

    run: float
    least: float
    whole: float


def sharing_of(trials: Sequence[Trial], budgets: Sequence[int]) -> Sharing:
    """What the trials of a log share. Trials that failed are left out: how far they came is not known."""
    known: set[tuple[int, Path]] = set()
    run = least = whole = 0.0
    for trial in trials:
        if trial.status == "failed":
            continue
        run += trial.layer_forwards * trial.budget
        whole += len(trial.candidate.choices) * trial.budget
        for before, budget in zip([0, *budgets], budgets, strict=False):
            if budget <= trial.budget:
                least += _new_layers(trial.candidate, budget, known) * (budget - before)
    return Sharing(run=run, least=least, whole=whole)


def _new_layers(candidate: Candidate, segment: int, known: set[tuple[int, Path]]) -> int:
    """How many of its layers were not run on a segment yet; from now on they were."""
    items = candidate.items()
    paths = [items[:depth] for depth in range(1, len(items) + 1)]
    new = sum((segment, path) not in known for path in paths)
    known.update((segment, path) for path in paths)
    return new
