"""The race itself, with losses that are given."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from intarsia.pruning.race import best_of, mean_loss, race


class Track:
    """Losses by candidate and sequence, and who was asked for which sequences."""

    def __init__(self, sums: dict[str, Sequence[float]], counts: Sequence[int] | None = None) -> None:
        self.sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()}
        size = len(next(iter(self.sums.values())))
        self.counts = torch.tensor(counts) if counts is not None else torch.ones(size, dtype=torch.int64)
        self.asked: list[tuple[str, int, int]] = []

    def losses(self, names: Sequence[str], part: slice) -> list[Tensor]:
        self.asked += [(name, part.start, part.stop) for name in names]
        return [self.sums[name][part] for name in names]

    def run(self, *, racing: bool = True) -> tuple[str, dict[str, Tensor]]:
        return race(list(self.sums), self.losses, self.counts, racing=racing, title="race")


def noisy(mean: float, size: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (mean + torch.randn(size, generator=generator, dtype=torch.float64)).tolist()


def test_without_racing_all_see_all_at_once() -> None:
    track = Track({"a": [3.0] * 40, "b": [1.0] * 40, "c": [2.0] * 40})
    best, seen = track.run(racing=False)
    assert best == "b"
    assert track.asked == [("a", 0, 40), ("b", 0, 40), ("c", 0, 40)]
    assert {name: float(sums.sum()) for name, sums in seen.items()} == {"a": 120.0, "b": 40.0, "c": 80.0}


def test_parts_double_and_the_worse_half_leaves() -> None:
    """Eight noisy candidates of 128 sequences: 2, 4, 8, ... of these; 8, 4, 2, 2, ... candidates at most."""
    track = Track({str(number): noisy(number / 4, 128, number) for number in range(8)})
    best, seen = track.run()
    parts = [(start, stop) for _, start, stop in track.asked]
    doubling = [(0, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]
    assert sorted(set(parts)) == doubling[: len(set(parts))]
    for (start, stop), most in zip(sorted(set(parts)), (8, 4, 2, 2, 2, 2, 2), strict=False):
        assert parts.count((start, stop)) <= most
    assert best == min(track.sums, key=lambda name: float(track.sums[name].sum()))
    # What is reported of each is what it was asked for, in order.
    for name, sums in seen.items():
        assert torch.equal(sums, track.sums[name][: sums.numel()])


def test_few_sequences_are_not_raced_on() -> None:
    few = Track({"a": [1.0] * 8, "b": [2.0] * 8})
    assert few.run()[0] == "a"
    assert few.asked == [("a", 0, 8), ("b", 0, 8)]


def test_a_sure_winner_runs_no_further() -> None:
    track = Track({"good": noisy(0.0, 64, 1), "bad": noisy(50.0, 64, 2)})
    best, seen = track.run()
    assert best == "good"
    assert (seen["good"].numel(), seen["bad"].numel()) == (8, 8)


def test_two_that_are_close_run_to_the_end() -> None:
    """The one that begins better is worse over all."""
    first = [0.0, 1.0] * 32
    second = [1.0, 0.0] * 16 + [0.5, 0.0] * 16
    track = Track({"first": first, "second": second})
    best, seen = track.run()
    assert best == "second"
    assert all(sums.numel() == 64 for sums in seen.values())


def test_of_equal_candidates_the_first_wins() -> None:
    for racing in (False, True):
        track = Track({"x": [1.0] * 32, "y": [1.0] * 32, "z": [1.0] * 32})
        assert track.run(racing=racing)[0] == "x"


def test_one_candidate_has_won() -> None:
    assert Track({"only": [1.0] * 32}).run()[0] == "only"


def test_losses_count_by_token() -> None:
    """A long sequence does not make a candidate look worse: paired differences are of means."""
    counts = [1, 100] * 16
    sums = {"a": [1.0, 200.0] * 16, "b": [2.0, 100.0] * 16}
    best, seen = Track(sums, counts).run(racing=False)
    assert best == "b"
    assert mean_loss(seen["a"], torch.tensor(counts)) == pytest.approx(201 / 101)
    assert mean_loss(seen["b"][:2], torch.tensor(counts)) == pytest.approx(102 / 101)


def test_sequences_that_predict_nothing_do_not_decide() -> None:
    counts = [0] * 10 + [5] * 30
    sums = {"a": [0.0] * 10 + [5.0] * 30, "b": [0.0] * 10 + [10.0] * 30}
    best, _ = Track(sums, counts).run()
    assert best == "a"


def test_the_best_few_are_never_given_up() -> None:
    """Three candidates clearly worse than the best, two of which are kept; the race then stops."""
    track = Track({"a": noisy(0.0, 64, 0), "b": noisy(40.0, 64, 1), "c": noisy(20.0, 64, 2), "d": noisy(30.0, 64, 3)})
    best, seen = race(list(track.sums), track.losses, track.counts, racing=True, keep=3, title="race")
    assert best == "a"
    assert best_of(seen, 3) == ["a", "c", "d"] and {sums.numel() for sums in seen.values()} == {2}
    alone = Track({"only": [1.0] * 64})
    _, seen = race(["only"], alone.losses, alone.counts, racing=True, keep=2, title="race")
    assert seen["only"].numel() == 2
