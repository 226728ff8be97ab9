from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from intarsia.errors import UserError
from intarsia.evaluation.results import Metric, Ratio, Retention, TaskResults, TaskScore, retention


def mean_of(values: Sequence[float]) -> Metric:
    return Metric(value=sum(values) / len(values), stderr=None)


def score(outcomes: list[int], *, name: str = "quiz", chance: float | None = 0.25, items: str = "abc") -> TaskScore:
    values = tuple(map(float, outcomes))
    return TaskScore(
        name=name,
        metrics={"acc": mean_of(values)},
        n=len(values),
        chance=chance,
        outcomes={"acc": values},
        items_sha256=items,
        source="local",
    )


def draws_by_hand(dense: np.ndarray, other: np.ndarray, n_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items drawn one by one, the same ones for both models."""
    chosen = np.random.default_rng(seed).integers(len(dense), size=(n_draws, len(dense)))
    return dense[chosen].mean(1), other[chosen].mean(1)


def test_ratio_and_interval_by_hand() -> None:
    chance = np.random.default_rng(5)
    dense = chance.random(300) < 0.6
    other = np.where(chance.random(300) < 0.8, dense, chance.random(300) < 0.4)
    found = retention([score(list(dense))], [score(list(other))], against="big", draws=20_000)
    (task,) = found.tasks
    assert task.accuracy is not None and task.above_chance is not None
    assert task.accuracy.value == pytest.approx(other.mean() / dense.mean())
    assert task.above_chance.value == pytest.approx((other.mean() - 0.25) / (dense.mean() - 0.25))
    d, o = draws_by_hand(dense.astype(float), other.astype(float), 20_000, seed=1)
    assert (task.accuracy.low, task.accuracy.high) == pytest.approx(np.percentile(o / d, [2.5, 97.5]), abs=0.006)
    above = np.percentile((o - 0.25) / (d - 0.25), [2.5, 97.5])
    assert (task.above_chance.low, task.above_chance.high) == pytest.approx(above, abs=0.012)
    # The pairing is what makes it narrow: drawn apart, it would be about twice as wide.
    apart = np.percentile(o / draws_by_hand(dense.astype(float), other.astype(float), 20_000, seed=2)[0], [2.5, 97.5])
    assert task.accuracy.high - task.accuracy.low < 0.8 * (apart[1] - apart[0])
    assert found.mean.accuracy == task.accuracy and found.mean.n == 300


def test_mean_over_tasks_by_hand() -> None:
    chance = np.random.default_rng(7)
    sizes = (40, 400)
    dense = [chance.random(n) < 0.7 for n in sizes]
    other = [chance.random(n) < 0.5 for n in sizes]
    names = ("small", "large")
    found = retention(
        [score(list(values), name=name) for name, values in zip(names, dense, strict=True)],
        [score(list(values), name=name) for name, values in zip(names, other, strict=True)],
        against="big",
    )
    drawn = [
        draws_by_hand(d.astype(float), o.astype(float), 10_000, seed=i)
        for i, (d, o) in enumerate(zip(dense, other, strict=True))
    ]
    ratios = sum(o for _, o in drawn) / sum(d for d, _ in drawn)
    assert found.mean.accuracy is not None
    assert found.mean.accuracy.value == pytest.approx(sum(o.mean() for o in other) / sum(d.mean() for d in dense))
    bounds = (found.mean.accuracy.low, found.mean.accuracy.high)
    assert bounds == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.012)


def test_equal_models_keep_all_and_draws_are_seeded() -> None:
    right = [1, 0, 1, 1, 0, 1, 1, 1] * 20
    same = retention([score(right)], [score(right)], against="big")
    assert same.mean.accuracy == Ratio(value=1.0, low=1.0, high=1.0)
    worse = [0, *right[1:-8], *[0] * 8]
    first = retention([score(right)], [score(worse)], against="big", seed=3)
    assert first == retention([score(right)], [score(worse)], against="big", seed=3)
    assert first != retention([score(right)], [score(worse)], against="big", seed=4)


def test_nothing_to_keep() -> None:
    (task,) = retention([score([0, 0, 0])], [score([1, 0, 0])], against="big").tasks
    assert task.accuracy is None and task.above_chance is None
    # At chance a ratio is nothing; slightly above it has a value, and no interval.
    half = score([1, 0] * 10, chance=0.5)
    assert retention([half], [half], against="big").tasks[0].above_chance is None
    near = score([*[1, 0] * 9, 1, 1], chance=0.5)
    assert retention([near], [half], against="big").tasks[0].above_chance == Ratio(value=0.0, low=None, high=None)
    assert (
        retention([score([1, 1], chance=None)], [score([1, 0], chance=None)], against="big").mean.above_chance is None
    )


def test_other_items_and_other_tasks_are_refused() -> None:
    one, two = score([1, 0]), score([1, 0], items="other")
    with pytest.raises(UserError, match=r"quiz: .* not scored on the same items \(2 and 2"):
        retention([one], [two], against="big")
    with pytest.raises(UserError, match="on the tasks quiz, the other on test"):
        retention([one], [score([1, 0], name="test")], against="big")
    with pytest.raises(UserError, match="was scored on the tasks"):
        retention([], [], against="big")
    with pytest.raises(UserError, match="not a mean over items"):
        retention([one], [replace(one, outcomes={})], against="big")


def test_results_survive_json() -> None:
    dense, other = score([1, 1, 0, 1]), score([1, 0, 0, 1])
    uneven = replace(score([1, 1], name="f1"), outcomes={"f1": (0.5, 0.25)}, metrics={"f1": mean_of([0.5, 0.25])})
    results = TaskResults(
        model="small",
        scores=(other, uneven),
        dtype="bfloat16",
        limit=4,
        retention=retention([dense], [other], against="big"),
    )
    written = json.dumps(results.to_dict(), allow_nan=False)
    assert '"acc": "1001"' in written
    assert TaskResults.from_dict(json.loads(written)) == results
    assert results.mean == pytest.approx((0.5 + 0.375) / 2)
    assert isinstance(results.retention, Retention)


def test_the_metric_that_stands_for_a_task() -> None:
    metric = mean_of([1.0, 0.0])
    assert replace(score([1]), metrics={"acc": metric, "acc_norm": metric}).primary == "acc_norm"
    assert replace(score([1]), metrics={"exact_match": metric, "acc": metric}).primary == "acc"
    assert replace(score([1]), metrics={"exact_match": metric, "f1": metric}).primary == "exact_match"
