"""The log of a search and its Pareto front."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from statistics import mean

import pytest

from intarsia.errors import UserError
from intarsia.tailoring.candidate import Candidate, from_plain, single, to_plain
from intarsia.tailoring.engine import chebyshev, draw_weights, order, scaled
from intarsia.tailoring.recipes import Translator
from intarsia.tailoring.run import EARLIER, History, Trial, dominates, front_of, leading, non_dominated


def make_trial(
    number: int, candidate: Candidate, *, budget: int = 16, costs: tuple[float, ...] | None = (1.5, 2.25)
) -> Trial:
    return Trial(
        number=number,
        engine="evolve",
        origin="mutation",
        candidate=candidate,
        recipe=f"{number:064x}",
        budget=budget,
        seed=3,
        status="failed" if costs is None else "ok",
        costs=costs,
        examples=() if costs is None else (16, 12),
        layer_forwards=3.5,
        seconds=0.25,
        worker="1",
        attempts=2 if costs is None else 1,
        reason="NaN in prose" if costs is None else None,
    )


def test_candidates_come_back(translator: Translator) -> None:
    rng = random.Random(0)
    for _ in range(50):
        candidate = translator.space.random(rng)
        assert from_plain(json.loads(json.dumps(to_plain(candidate)))) == candidate


def test_trials_come_back(translator: Translator, tmp_path: Path) -> None:
    rng = random.Random(1)
    trials = [make_trial(n, translator.space.random(rng), costs=None if n == 1 else (n / 3, 1e-17)) for n in range(3)]
    history = History(tmp_path / "trials.jsonl")
    for trial in trials:
        history.append(trial)
    assert History(tmp_path / "trials.jsonl").trials == tuple(trials)
    assert history.find((f"{1:064x}", 16)) == trials[1]
    assert history.find((f"{1:064x}", 32)) is None
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3


def test_a_line_that_was_cut_off(translator: Translator, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    rng = random.Random(2)
    trials = [make_trial(n, translator.space.random(rng)) for n in range(3)]
    history = History(path)
    history.append(trials[0])
    history.append(trials[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    cut = path.read_bytes()
    again = History(path)
    assert again.trials == (trials[0],)
    assert path.read_bytes() == cut
    again.append(trials[1])
    assert path.read_bytes() == whole
    again.append(trials[2])
    assert History(path).trials == tuple(trials)


def test_a_line_that_is_no_trial(translator: Translator, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    history = History(path)
    history.append(make_trial(0, translator.space.random(random.Random(3))))
    path.write_text(path.read_text() + '{"number": 1}\n')
    with pytest.raises(UserError) as caught:
        History(path)
    assert f"Line 2 of {path} is no trial" in str(caught.value)


def test_taken_over_trials_are_not_made(translator: Translator, tmp_path: Path) -> None:
    history = History(tmp_path / "trials.jsonl")
    one = make_trial(0, translator.space.random(random.Random(4)))
    history.append(Trial(**{**one.__dict__, "engine": EARLIER}))
    history.append(make_trial(1, translator.space.random(random.Random(5))))
    assert [trial.number for trial in history.made] == [1]
    assert len(history) == 2


ONE = Candidate(positions=(0,), choices=(single("base"),))


def trial(number: int, costs: tuple[float, ...] | None, budget: int = 8) -> Trial:
    return Trial(
        number=number,
        engine="random",
        origin="random",
        candidate=ONE,
        recipe=str(number),
        budget=budget,
        seed=0,
        status="ok" if costs else "failed",
        costs=costs,
        reason=None if costs else "NaN",
    )


def test_domination() -> None:
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((1, 3), (2, 2))


def test_non_dominated_by_hand() -> None:
    assert non_dominated([(1, 4), (2, 2), (4, 1), (3, 3), (2, 2), (1, 5)]) == [0, 1, 2]


def test_non_dominated_is_every_undominated_point() -> None:
    rng = random.Random(0)
    costs = [(rng.random(), rng.random(), rng.random()) for _ in range(60)]
    expected = [i for i, a in enumerate(costs) if not any(dominates(b, a) for b in costs)]
    assert non_dominated(costs) == expected


def test_front_compares_at_one_budget() -> None:
    trials = [
        trial(0, (0.0, 0.0), budget=4),
        trial(1, (1.0, 4.0)),
        trial(2, (2.0, 2.0)),
        trial(3, (4.0, 1.0)),
        trial(4, None),
    ]
    front = front_of([*trials, trial(5, (3.0, 3.0))], ("a", "b"), max_budget=8)
    assert front is not None
    assert [point.number for point in front.points] == [1, 2, 3]
    assert (front.budget, front.top, len(front.rivals)) == (8, True, 4)
    assert front.knee.number == 2  # scaled (1/3, 1/3) against (0, 1) and (1, 0)
    assert (front.best("a").number, front.best("b").number) == (1, 3)
    assert front.to_dict()["best"] == {"a": 1, "b": 3}
    assert front.to_dict()["points"][1]["costs"] == {"a": 2.0, "b": 2.0}


def test_what_may_be_promoted_or_built() -> None:
    trials = [
        trial(0, (1.0, 1.0), budget=4),
        trial(1, (0.5, 2.0), budget=4),
        trial(2, (2.0, 2.0), budget=4),
        trial(0, (3.0, 3.0)),
        trial(3, None),
    ]
    assert leading(trials) == {"0", "1"}
    assert leading([*trials, trial(4, (2.0, 2.0))]) == {"1", "4"} and leading([]) == set()


def test_the_knee_weighs_differences_as_all_trials_of_its_budget_do() -> None:
    """Two points on the front: of the costs in which they hardly differ only one says which it is."""
    trials = [trial(0, (0.6, 4.25, 0.8)), trial(1, (1.3, 4.24, 0.5))]
    alone = front_of(trials, ("a", "b", "c"), max_budget=8)
    assert alone is not None and alone.knee.number == 1  # (0, 1, 1) against (1, 0, 0)
    others = [trial(2, (1.2, 4.32, 1.1)), trial(3, (1.3, 4.34, 0.6))]
    front = front_of([*trials, *others], ("a", "b", "c"), max_budget=8)
    assert front is not None and [point.number for point in front.points] == [0, 1]
    assert front.knee.number == 0  # (0, 0.1, 0.5) against (1, 0, 0)
    assert front.to_dict()["trials"] == 4


def test_front_of_nothing() -> None:
    assert front_of([trial(0, None)], ("a",), max_budget=8) is None
    front = front_of([trial(0, (1.0,), budget=4)], ("a",), max_budget=8)
    assert front is not None
    assert not front.top


def test_chebyshev_by_hand() -> None:
    assert chebyshev((0.5, 1.0), (0.8, 0.2)) == pytest.approx(0.4 + 0.05 * 0.6)


def test_scaled() -> None:
    assert scaled([(1, 7), (3, 7), (2, 7)]) == [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0)]
    assert scaled([]) == []
    assert scaled([(1, 7)], among=[(1, 7), (3, 3)]) == [(0.0, 1.0)]


def test_order_follows_the_weights() -> None:
    costs = [(0.0, 1.0), (1.0, 0.0), (0.4, 0.4)]
    assert order(costs, (0.99, 0.01)) == [0, 2, 1]
    assert order(costs, (0.01, 0.99)) == [1, 2, 0]
    assert order(costs, (0.5, 0.5))[0] == 2


def test_each_point_of_a_convex_front_is_the_best_for_some_weights() -> None:
    costs = [(x / 10, (1 - x / 10) ** 2) for x in range(11)]
    weights = [(w / 200, 1 - w / 200) for w in range(201)]
    assert {order(costs, pair)[0] for pair in weights} == set(range(11))


def test_weights_are_even_on_the_simplex() -> None:
    rng = random.Random(0)
    drawn = [draw_weights(3, rng) for _ in range(4000)]
    assert all(sum(weights) == pytest.approx(1.0) for weights in drawn)
    for index in range(3):
        assert mean(weights[index] for weights in drawn) == pytest.approx(1 / 3, abs=0.02)
    # Evenly on a triangle: a corner of half its sides has a quarter of the points.
    for index in range(3):
        assert mean(weights[index] > 0.5 for weights in drawn) == pytest.approx(0.25, abs=0.03)
    assert all(a != b for a, b in itertools.pairwise(drawn))
