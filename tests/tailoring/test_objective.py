"""Objectives and the order of their examples."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import UserError
from intarsia.evaluation.likelihood import Request
from intarsia.tailoring.objective import (
    Example,
    Measure,
    Objective,
    check_varied,
    in_order,
    segments,
)


def request(*tokens: int) -> Request:
    return Request(context=(9,), continuation=tokens)


ASKED = (
    Example(requests=(request(1), request(2), request(3)), gold=1, characters=(2, 4, 1)),
    Example(requests=(request(1), request(2)), gold=0, characters=(1, 2)),
)
# Divided by characters: (-2, -1.5, -3) and (-3, -1).
LIKELIHOODS = np.array([-4.0, -6.0, -3.0, -3.0, -2.0])


@pytest.mark.parametrize(
    ("measure", "scores"),
    [("accuracy", [0.0, 1.0]), ("margin", [-0.5, 2.0]), ("likelihood", [1.5, 3.0])],
)
def test_questions(measure: Measure, scores: list[float]) -> None:
    objective = Objective(name="quiz", measure=measure, source="quiz.jsonl", examples=ASKED)
    found = objective.scores(LIKELIHOODS)
    assert found.tolist() == scores
    mean = sum(scores) / 2
    stderr = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
    assert objective.cost(found) == pytest.approx((mean, stderr))
    first = objective.scores(LIKELIHOODS[:3])
    assert first.tolist() == scores[:1] and objective.cost(first) == (scores[0], 0.0)


@pytest.mark.parametrize(("measure", "sign"), [("loss", -1.0), ("kl", 1.0)])
def test_tokens_count_alike(measure: Measure, sign: float) -> None:
    examples = (Example(requests=(request(1, 2, 3),)), Example(requests=(request(4),)))
    objective = Objective(name="text", measure=measure, source="text.txt", examples=examples)
    found = objective.scores(np.array([sign * 6.0, sign * 4.0]))
    assert found.tolist() == [6.0, 4.0]
    # 10 nats over 4 tokens; residuals 6 - 7.5 and 4 - 2.5, two tokens an example.
    assert objective.cost(found) == pytest.approx((2.5, math.sqrt(2 * 1.5**2 / 2) / 2))


@given(count=st.integers(1, 60), cuts=st.lists(st.integers(1, 80), max_size=6))
def test_segments_tile_and_nest(count: int, cuts: list[int]) -> None:
    found = list(segments(count, cuts))
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == count and all(start < end for start, end in found)
    larger = list(segments(count + 30, [*cuts, count]))
    assert larger[: len(found)] == found


def test_batches_hold_every_request_of_a_segment() -> None:
    objective = Objective(name="quiz", measure="margin", source="quiz.jsonl", examples=ASKED)
    (batch,) = objective.batches((0, 2), pack=True, batch_tokens=512)
    assert sorted(batch.request_M.tolist()) == [0, 1, 2, 3, 4]
    assert batch.rows.attend_BTT is not None
    assert batch.rows.ids_BT.shape == (1, 1)  # one context, and answers of one token, which are never read
    (last,) = objective.batches((1, 2), pack=False, batch_tokens=512)
    assert last.request_M.tolist() == [0, 1] and last.rows.attend_BTT is None


def test_objectives_that_say_nothing() -> None:
    def made(name: str, measure: Measure, examples: tuple[Example, ...] = ASKED) -> Objective:
        return Objective(name=name, measure=measure, source=f"{name}.jsonl", examples=examples)

    wrong, flat, fine, far = (
        made("wrong", "accuracy"),
        made("flat", "loss"),
        made("fine", "accuracy"),
        made("far", "kl"),
    )
    one, same = np.array([1.0]), np.array([0.0, 0.0])
    with pytest.raises(UserError) as caught:
        check_varied([wrong, flat, fine], [np.array([1.0, 1.0]), np.array([0.3, 0.3]), np.array([0.0, 1.0])])
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == 2 and "wrong (wrong.jsonl)" in found[0] and "each of its 2 examples" in found[1]
    # One question is no reason to refuse, and a base is never far from itself.
    check_varied([made("wrong", "accuracy", ASKED[:1]), far], [one, same])
    # Equal examples may have scores that differ a little, in batches of different shapes.
    twice = [made(measure, measure, ASKED[:1] * 2) for measure in ("kl", "loss")]
    with pytest.raises(UserError) as caught:
        check_varied(twice, [same, np.array([0.3, 0.3 + 1e-9])])
    assert all("all 2 examples are the same" in str(problem) for problem in caught.value.problems)
    assert len(caught.value.problems) == 2


def question(gold: int, length: int, source: str = "") -> Example:
    requests = tuple(Request(context=tuple(range(length)), continuation=(choice,)) for choice in range(4))
    return Example(requests=requests, gold=gold, characters=(1, 2, 3, 4), source=source)


def questions(n: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [question(rng.choice([0, 0, 0, 1, 2]), rng.randint(1, 60), rng.choice("ab")) for _ in range(n)]


def test_sizes() -> None:
    example = question(1, 7)
    assert example.tokens == 4
    assert example.length == 11


@given(n=st.integers(1, 80), seed=st.integers(0, 5))
def test_the_order_has_every_example_once_and_is_the_seeds(n: int, seed: int) -> None:
    examples = questions(n)
    ordered = in_order(examples, seed)
    assert Counter(map(id, ordered)) == Counter(map(id, examples))
    assert in_order(examples, seed) == ordered


def test_another_seed_is_another_order() -> None:
    examples = questions(60)
    assert in_order(examples, 0) != in_order(examples, 1)
    hashes = [
        Objective(name="quiz", measure="margin", source="x", examples=in_order(examples, seed)).sha256
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_budget_is_stratified() -> None:
    examples = [question(gold, length, source) for source in "ab" for gold in range(2) for length in range(1, 91)]
    ordered = in_order(examples, 3)
    for budget in (12, 24, 60, 120, 240):
        found = Counter((example.source, example.gold, (example.length - 5) // 30) for example in ordered[:budget])
        # Twelve strata of equal size: the first examples hold their share of each, within one.
        for stratum in ((source, gold, bucket) for source in "ab" for gold in range(2) for bucket in range(3)):
            assert abs(found[stratum] - budget / 12) <= 1
