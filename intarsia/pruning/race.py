"""Racing: evaluate candidates on growing parts of the calibration set, and eliminate the clearly worse ones early."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from intarsia import progress

if TYPE_CHECKING:
    from torch import Tensor

Name = TypeVar("Name", bound=Hashable)

# Sequences of the first part; each further part doubles the total.
_FIRST = 2
# Standard errors at which a candidate is eliminated, and the least number of sequences for that.
_ERRORS = 2.0
_LEAST = 8
# Least number of candidates to compare until the end.
_LAST = 2


def race(
    candidates: Sequence[Name],
    losses: Callable[[Sequence[Name], slice], Iterable[Tensor]],
    counts_N: Tensor,
    *,
    racing: bool,
    keep: int = 1,
    title: str,
) -> tuple[Name, dict[Name, Tensor]]:
    """The candidate of least loss on the calibration set, and the losses of all candidates.

    After each part, eliminate the worse half, and every candidate whose paired differences to the best, sequence by
    sequence, have a mean of more than two standard errors above zero.

    Args:
        candidates: distinct; the first of equal ones wins.
        losses: the summed loss of some candidates on each of some sequences, float64.
        counts_N: predicted tokens in each sequence.
        racing: False evaluates all of them on everything.
        keep: number of best candidates that are never eliminated; the race stops when no others are left.

    Returns:
        The best, and the summed losses of each candidate on the sequences that it ran on.
    """
    import torch

    found: dict[Name, list[Tensor]] = {name: [] for name in candidates}
    alive = list(candidates)
    stages = _parts(counts_N.numel(), racing=racing)
    sizes = [part.stop - part.start for part in stages]
    with progress.current().task(title, _length(len(alive), sizes, keep)) as task:
        for part, size in zip(stages, sizes, strict=True):
            for name, sums in zip(alive, losses(alive, part), strict=True):
                found[name].append(sums)
                task.advance(size)
            number_N = counts_N[: part.stop]
            # A sequence that is nearly all padding predicts nothing, and has no mean.
            means = {name: (torch.cat(found[name]) / number_N)[number_N > 0] for name in alive}
            alive = _survivors(alive, means, keep) if part.stop < counts_N.numel() else alive
            if len(alive) <= keep:
                break
            task.note(f"{len(alive)} left")
    totals = {name: float(torch.cat(found[name]).sum()) for name in alive}
    best = min(alive, key=lambda name: (totals[name], alive.index(name)))
    return best, {name: torch.cat(sums) for name, sums in found.items()}


def best_of(sums: Mapping[Name, Tensor], number: int) -> list[Name]:
    """The best surviving candidates, best first."""
    last = max(found.numel() for found in sums.values())
    finished = [name for name in sums if sums[name].numel() == last]
    return sorted(finished, key=lambda name: float(sums[name].sum()))[:number]


def mean_loss(sums_N: Tensor, counts_N: Tensor) -> float:
    """Loss per token on the sequences that a candidate ran on, in nats."""
    return float(sums_N.sum() / counts_N[: sums_N.numel()].sum())


def _parts(total: int, *, racing: bool) -> list[slice]:
    stops = [total]
    while racing and total > _LEAST and stops[0] > _FIRST:
        stops.insert(0, math.ceil(stops[0] / 2))
    return [slice(first, stop) for first, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _survivors(alive: Sequence[Name], means: Mapping[Name, Tensor], keep: int) -> list[Name]:
    """The better half of the candidates without the clearly worse ones, in the order of `alive`.

    `means` are losses per token, by sequence. At least two survive, unless one is clearly best.
    """
    if means[alive[0]].numel() == 0:
        return list(alive)
    ranked = sorted(alive, key=lambda name: float(means[name].mean()))
    half = ranked[: max(_LAST, keep, math.ceil(len(ranked) / 2))]
    safe = half[:keep]
    return [
        name for name in alive if name in safe or (name in half and not _clearly_worse(means[name] - means[ranked[0]]))
    ]


def share_at_most(candidates: int, sequences: int, *, racing: bool, keep: int = 1) -> float:
    """The most that a race costs, as a share of all candidates on all sequences; one costs up to twice the mean."""
    parts = [part.stop - part.start for part in _parts(sequences, racing=racing)]
    run = 2 * _length(candidates, parts, keep) - candidates * parts[0]  # all candidates run on the first part
    return min(1.0, run / (candidates * sequences))


def _length(candidates: int, sizes: Sequence[int], keep: int) -> int:
    """Sequences that a race runs at most."""
    length = 0
    for size in sizes:
        length += candidates * size
        candidates = max(min(max(_LAST, keep), candidates), math.ceil(candidates / 2))
    return length


def _clearly_worse(gap_N: Tensor) -> bool:
    if gap_N.numel() < _LEAST:
        return False
    error = float(gap_N.std()) / math.sqrt(gap_N.numel())
    return float(gap_N.mean()) > _ERRORS * error
