"""Blocks of adjacent layers that the original could do without, instead of all steps that were taken so far.

Steps are taken one by one, each the best of its time, and their path need not lead to the best model: a block of layers
whose place is taken by the layer before it, repaired once, can be better than as many single steps, each repaired
(dev/LOG.md). A block of the original is what CoMe-P's concatenation is with all pieces from one layer; which one is
chosen as spans are, by the least influence (arXiv 2403.17887, where it is a method of its own), and then by the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from intarsia.planning.intermediate import Intermediate
from intarsia.planning.planner import Step
from intarsia.recipe.ops import Op, sources_of

NEAREST = 8
"""Blocks between whose ends the residual stream turns least, of which the loss is looked at."""

_OF_A_STEP = ("dropped", "prior_ratios", "counts")


def best_blocks(
    whole: Intermediate,
    like: Step,
    number: int,
    loss: Callable[[Step], float],
    *,
    removed: int,
    known: Iterable[Sequence[Op]],
) -> list[tuple[Step, float]]:
    """Steps that leave so many layers out of the original, each with its loss: the one of least loss first.

    Args:
        whole: the original, with its hidden states.
        like: another step towards the same depth, for what it was decided on.
        loss: of the model that a step leads to, before any repair.
        known: models that are tried already.
    """
    seen = {tuple(ops) for ops in known}
    steps: list[Step] = []
    shared = {name: value for name, value in like.evidence.items() if name not in _OF_A_STEP}
    for start in range(whole.depth - removed + 1):
        stop = start + removed
        ops = (*whole.ops[:start], *whole.ops[stop:])
        if ops not in seen:
            steps.append(
                Step(
                    start=start,
                    count=removed,
                    op=None,
                    whole=ops,
                    evidence={**shared, "block": [start, stop], "dropped": sources_of(whole.ops[start:stop])},
                )
            )
    near = sorted(steps, key=lambda step: whole.span_distance(step.start, removed, "all-tokens"))[:NEAREST]
    return sorted(((step, loss(step)) for step in near), key=lambda found: found[1])[:number]
