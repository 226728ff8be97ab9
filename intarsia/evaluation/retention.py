"""How much of a model's accuracy another one keeps, with a paired bootstrap interval.

Retention is the other's accuracy divided by the first's, on the same items; above chance, both less what guessing
gives. Over several tasks it is the ratio of the means over tasks. The interval holds 95 % of what comes out when items
are drawn anew with replacement, both models being judged on the same draw; over several tasks, within each of them.

Items with equal outcomes are the same to a draw, so that a draw of n items is a draw of how often each pair of
outcomes occurs: the same distribution, at the cost of a few numbers a task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from intarsia.errors import Problem, UserError
from intarsia.evaluation.score import TaskScore

_DRAWS = 10_000
_LEVELS = (2.5, 97.5)
_MOST_UNSOUND = 1e-3  # share of draws without anything to divide by; they are left out

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio with its interval; None where more than one draw in a thousand leaves nothing to divide by."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Retained:
    """What is kept of one task, or of the mean over tasks.

    `accuracy` is the plain ratio, `above_chance` the one of what exceeds guessing; each None where the first model has
    nothing to be kept. `n` items.
    """

    name: str
    metric: str
    n: int
    accuracy: Ratio | None
    above_chance: Ratio | None


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept against the model `against`: task by task, and of the mean over the tasks."""

    against: str
    tasks: tuple[Retained, ...]
    mean: Retained
    draws: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"tasks": [asdict(task) for task in self.tasks]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Retention:
        """The retention that `to_dict` wrote."""
        return cls(
            against=data["against"],
            tasks=tuple(_read(task) for task in data["tasks"]),
            mean=_read(data["mean"]),
            draws=data["draws"],
            seed=data["seed"],
        )


def retention(
    dense: Sequence[TaskScore], other: Sequence[TaskScore], *, against: str, draws: int = _DRAWS, seed: int = 0
) -> Retention:
    """What `other` keeps of `dense`, in the primary metric of each task.

    Args:
        dense: the scores to be kept, of the model called `against`.
        other: scores on the same tasks in the same order.
        draws: bootstrap samples.
        seed: of the draws.

    Raises:
        UserError: the tasks or their items differ, or a score has no outcomes of single items.
    """
    _check(dense, other)
    tasks, draws_TD = [], []
    for number, (first, second) in enumerate(zip(dense, other, strict=True)):
        d_n, o_n = (np.array(score.outcomes[first.primary]) for score in (first, second))
        drawn = _means(d_n, o_n, draws, np.random.default_rng([seed, number]))
        values = (first.value, second.metrics[first.primary].value)
        tasks.append(_retained(first.name, first.primary, len(d_n), first.chance, values, drawn))
        draws_TD.append(drawn)
    chances = [score.chance for score in dense if score.chance is not None]
    mean = _retained(
        "mean",
        "primary",
        sum(task.n for task in tasks),
        math.fsum(chances) / len(dense) if len(chances) == len(dense) else None,
        (
            math.fsum(first.value for first in dense) / len(dense),
            math.fsum(second.metrics[first.primary].value for first, second in zip(dense, other, strict=True))
            / len(dense),
        ),
        (np.mean([d_D for d_D, _ in draws_TD], axis=0), np.mean([o_D for _, o_D in draws_TD], axis=0)),
    )
    return Retention(against=against, tasks=tuple(tasks), mean=mean, draws=draws, seed=seed)


def _check(dense: Sequence[TaskScore], other: Sequence[TaskScore]) -> None:
    names, found = ([score.name for score in scores] for scores in (dense, other))
    if not names or names != found:
        raise UserError.of(
            where="retention",
            expected=f"scores on the tasks {', '.join(names) or '(none given)'}",
            found=f"scores on {', '.join(found) or 'none'}",
            remedy="Evaluate both models on the same tasks.",
        )
    problems = []
    for first, second in zip(dense, other, strict=True):
        if first.items_sha256 != second.items_sha256:
            problems.append(
                Problem(
                    where=f"retention on {first.name}",
                    expected=f"the same items for both models ({first.n}, sha256 {first.items_sha256[:12]})",
                    found=f"other items ({second.n}, sha256 {second.items_sha256[:12]})",
                    remedy="Evaluate both models with the same task files, prompts and limit.",
                )
            )
        elif not all(first.primary in score.outcomes for score in (first, second)):
            problems.append(
                Problem(
                    where=f"retention on {first.name}",
                    expected=f"outcomes of single items for {first.primary}",
                    found="a metric that is no mean over items",
                    remedy="Leave this task out of the comparison.",
                )
            )
    if problems:
        raise UserError(problems)


def _means(d_n: Floats, o_n: Floats, draws: int, chance: np.random.Generator) -> tuple[Floats, Floats]:
    """Both models' means in every draw."""
    pairs, counts = np.unique(np.stack([d_n, o_n], axis=1), axis=0, return_counts=True)
    drawn = chance.multinomial(len(d_n), counts / len(d_n), size=draws) / len(d_n)
    return drawn @ pairs[:, 0], drawn @ pairs[:, 1]


def _retained(
    name: str,
    metric: str,
    n: int,
    chance: float | None,
    values: tuple[float, float],
    drawn: tuple[Floats, Floats],
) -> Retained:
    """From the two models' values, the kept one's first, and their means in every draw."""
    (dense, other), (dense_D, other_D) = values, drawn
    above = None
    if chance is not None:
        above = _ratio((dense - chance, other - chance), (dense_D - chance, other_D - chance))
    return Retained(name=name, metric=metric, n=n, accuracy=_ratio(values, drawn), above_chance=above)


def _ratio(values: tuple[float, float], drawn: tuple[Floats, Floats]) -> Ratio | None:
    """None without anything to keep; no interval if that may be so for all that the items say."""
    (dense, other), (dense_D, other_D) = values, drawn
    if dense <= 0:
        return None
    sound_D = dense_D > 0
    if np.mean(~sound_D) > _MOST_UNSOUND:
        return Ratio(value=other / dense, low=None, high=None)
    low, high = np.percentile(other_D[sound_D] / dense_D[sound_D], _LEVELS)
    return Ratio(value=other / dense, low=float(low), high=float(high))


def _read(data: Mapping[str, Any]) -> Retained:
    ratios = {name: None if data[name] is None else Ratio(**data[name]) for name in ("accuracy", "above_chance")}
    return Retained(name=data["name"], metric=data["metric"], n=data["n"], **ratios)
