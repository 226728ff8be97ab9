"""What CoMe-P chooses from: ratios of spans, and removals of whole layers, raced by calibration loss.

A ratio that leaves layers out altogether is a removal too, but where layers are repaired on the way the two differ: a
removal leaves the layers that stay with what was fitted on them, a merge makes a layer anew. So where both give the
same layers, the removal is what is tried.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from intarsia.planning.candidates import Change, losses_of
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.race import best_of_groups, mean_loss, race
from intarsia.recipe.ops import Op

Counts: TypeAlias = tuple[tuple[int, int], ...]
"""KV groups and channels that each merged layer gives."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What could take the place of `count` layers from `start` on: a layer joined from them, or none."""

    start: int
    count: int
    op: Op | None
    shares: Sequence[float] = ()
    counts: Counts = ()

    @property
    def goes(self) -> Hashable:
        """Which layers it removes: all but the one that gives most; and whether it removes them whole."""
        span = range(self.start, self.start + self.count)
        if self.op is None:
            return tuple(span), True
        largest = max(range(self.count), key=lambda index: self.shares[index])
        return tuple(index for index in span if index != self.start + largest), False


@dataclass(frozen=True, kw_only=True)
class Raced:
    """Candidates that are left, the best first, and what every candidate has shown, for the log."""

    best: list[Candidate]
    shown: list[dict[str, Any]]


def removals(model: Intermediate, count: int) -> Iterable[Candidate]:
    """Every removal of so many adjacent layers."""
    for start in range(model.depth - count + 1):
        yield Candidate(start=start, count=count, op=None)


def distinct(model: Intermediate, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of those that lead to the same layers the first: two ratios may round to the same counts, and two spans may drop
    the same layer."""
    found: dict[tuple[Op, ...], Candidate] = {}
    for each in candidates:
        put_in = () if each.op is None else (each.op,)
        layers = (*model.ops[: each.start], *put_in, *model.ops[each.start + each.count :])
        found.setdefault(layers, each)
    return list(found.values())


def raced(model: Intermediate, tried: Sequence[Candidate], number: int, *, racing: bool, title: str) -> Raced:
    """The `number` candidates of least calibration loss, each of which removes something else."""
    changes = [Change(start=each.start, count=each.count, ops=() if each.op is None else (each.op,)) for each in tried]

    def group(index: int) -> Hashable:
        return tried[index].goes

    best, sums = race(
        range(len(tried)),
        lambda some, part: losses_of(model, [changes[index] for index in some], sequences=part),
        model.counts_N,
        racing=racing,
        keep=number,
        group=group,
        progress=model.progress,
        title=title,
    )
    losses = {index: mean_loss(found, model.counts_N) for index, found in sums.items()}
    shown = [
        {
            "start": each.start,
            **({"dropped": each.count} if each.op is None else {}),
            "ratios": list(each.shares),
            "sequences": sums[index].numel(),
            "loss": losses[index],
        }
        for index, each in enumerate(tried)
    ]
    if number == 1:
        return Raced(best=[tried[best]], shown=shown)
    return Raced(best=[tried[index] for index in best_of_groups(sums, number, group)], shown=shown)
