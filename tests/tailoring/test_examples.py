"""The order of examples: one for a seed, nested, and every beginning of it a fair part of the whole."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from intarsia.evaluation.likelihood import Request
from intarsia.tailoring.objective import Example, examples_hash, in_order


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
    assert examples_hash(in_order(examples, 0)) != examples_hash(in_order(examples, 1))
    assert examples_hash(in_order(examples, 0)) == examples_hash(in_order(list(examples), 0))


def test_every_beginning_is_stratified() -> None:
    examples = [question(gold, length, source) for source in "ab" for gold in range(2) for length in range(1, 91)]
    ordered = in_order(examples, 3)
    for budget in (12, 24, 60, 120, 240):
        found = Counter((example.source, example.gold, (example.length - 5) // 30) for example in ordered[:budget])
        # Twelve strata of equal size: a beginning holds its share of each, within one.
        for stratum in ((source, gold, bucket) for source in "ab" for gold in range(2) for bucket in range(3)):
            assert abs(found[stratum] - budget / 12) <= 1
