"""Examples that candidates are measured on, and the one order in which budgets take them.

The first so many examples of the order are the budget, so that a larger budget contains the smaller. Examples are in
strata (where they come from, which of the choices is right, how long they are), each stratum in random order, and
strata take turns by their sizes: among the first b of n examples are b/n of each stratum, within one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from intarsia.evaluation.requests import Request

_LENGTHS = 3  # classes of length, of equal size


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question, a text with its beginning, or a window of text, as tokens.

    `requests`: of a question one for each choice, else one. A window is its first token as context, and the others.
    `gold`: the right choice. `characters` of each choice, by which its log-likelihood is divided. `source`: where it
    comes from, if there are several places.
    """

    requests: tuple[Request, ...]
    gold: int | None = None
    characters: tuple[int, ...] = ()
    source: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(len(request.continuation) for request in self.requests)

    @property
    def length(self) -> int:
        """Tokens that are read, if what requests share is read once."""
        return len(self.requests[0].context) + self.tokens


def in_order(examples: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """The examples in the order of the budgets."""
    rng = random.Random(seed)
    by_length = sorted(range(len(examples)), key=lambda index: (examples[index].length, index))
    length = {index: rank * _LENGTHS // len(examples) for rank, index in enumerate(by_length)}
    strata: dict[tuple[str, int, int], list[int]] = {}
    for index, example in enumerate(examples):
        gold = -1 if example.gold is None else example.gold
        strata.setdefault((example.source, gold, length[index]), []).append(index)
    places: list[tuple[float, int]] = []
    for stratum in sorted(strata):
        members = strata[stratum]
        rng.shuffle(members)
        offset = rng.random()
        places += [((step + offset) / len(members), index) for step, index in enumerate(members)]
    return tuple(examples[index] for _, index in sorted(places))


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over the examples' tokens and right answers, in order."""
    digest = hashlib.sha256()
    for example in examples:
        requests = [[request.context, request.continuation] for request in example.requests]
        digest.update(json.dumps([requests, example.gold, example.characters]).encode() + b"\n")
    return digest.hexdigest()
