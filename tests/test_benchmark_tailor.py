"""The arithmetic of the benchmark `tailor`: curves, scores and what trials share, on numbers made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.tailor_parts.curves import curve_of, mean_curve, scalar, volume
from benchmarks.tailor_parts.scorer import kept, mean
from benchmarks.tailor_parts.sharing import sharing_of
from intarsia.tailoring.candidate import Candidate, single
from intarsia.tailoring.run import Trial


def trial(number: int, costs: tuple[float, ...] | None, *, budget: int = 9, members: str = "bbb", **more: Any) -> Trial:
    return Trial(
        number=number,
        engine="evolve",
        origin="",
        candidate=Candidate(positions=(0, 1, 2), choices=tuple(single(member) for member in members)),
        recipe=str(number),
        budget=budget,
        seed=0,
        status="failed" if costs is None else "ok",
        costs=costs,
        reason="NaN" if costs is None else None,
        **more,
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], 0.0),
        ([(0.0, 0.0, 0.0)], 1.0),
        ([(0.5, 0.5, 0.5)], 0.125),
        ([(0.5, 0.0), (0.0, 0.5)], 0.75),
        ([(0.5, 0.0), (0.0, 0.5), (0.6, 0.6), (2.0, 0.0)], 0.75),  # dominated, and beyond the corner
        ([(0.5, 0.5, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5)], 0.5),
        ([(-0.5, 0.0)], 1.5),  # better than the base
    ],
)
def test_volume(points: list[tuple[float, ...]], expected: float) -> None:
    assert volume(points) == pytest.approx(expected)


def test_curve() -> None:
    trials = [
        trial(0, (1.1, 2.2), budget=3),
        trial(1, (1.5, 3.0)),
        trial(2, None),
        trial(3, (1.2, 4.0)),
        trial(4, (1.2, 2.4)),
    ]
    found = curve_of(trials, (1.0, 2.0), 9)
    first, last = scalar((0.5, 0.5)), scalar((0.2, 0.2))
    assert first == pytest.approx(0.55)
    assert found.best == pytest.approx((None, first, first, first, last), nan_ok=True)
    assert found.volume[1:] == pytest.approx((0.25, 0.25, 0.25, 0.64))
    other = curve_of(trials[1:], (1.0, 2.0), 9)
    count, value = mean_curve([found, other], "volume")[0]
    assert (count, value) == (2, 0.25)


def test_the_mean_score() -> None:
    base = {"arc_easy": 0.5, "piqa": 0.6, "math_cot": 2.0, "news": 30.0, "WikiText-2": 40.0}
    row = {"arc_easy": 0.25, "piqa": 0.6, "math_cot": 8.0, "news": 40.0, "WikiText-2": 80.0}
    assert kept(row, base) == pytest.approx(
        {"arc_easy": 0.5, "piqa": 1.0, "math_cot": 0.25, "news": 0.75, "WikiText-2": 0.5}
    )
    assert mean(row, base) == pytest.approx(0.6)
    assert mean(base, base) == 1.0


def test_sharing() -> None:
    trials = [
        trial(0, (1.0,), budget=3, members="bbb", layer_forwards=3.0),
        trial(1, (1.0,), budget=3, members="bbm", layer_forwards=2.0),  # the least is 1
        trial(2, (1.0,), budget=9, members="bbb", layer_forwards=2.0),  # on 6 more examples
        trial(3, (1.0,), budget=9, members="mbb", layer_forwards=3.0),  # nothing to share
        trial(4, None, budget=9, members="mmm"),
    ]
    found = sharing_of(trials, (3, 9))
    assert (found.run, found.least, found.whole) == (3 * 3 + 2 * 3 + 2 * 9 + 3 * 9, 9 + 3 + 18 + 27, 72)
