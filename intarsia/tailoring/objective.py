"""Examples that candidates are measured on, and the one order in which budgets take them.

The first so many examples of the order are the budget, so that a larger budget contains the smaller. Examples are in
strata (where they come from, which of the choices is right, how long they are), each stratum in random order, and
strata take turns by their sizes: among the first b of n examples are b/n of each stratum, within one.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from intarsia.errors import Problem, UserError
from intarsia.evaluation.likelihood import Batch, Request, batches_of

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


Measure: TypeAlias = Literal["accuracy", "margin", "likelihood", "loss", "kl"]
QUESTIONS: tuple[Measure, ...] = ("accuracy", "margin", "likelihood")
Segment: TypeAlias = tuple[int, int]
"""Examples `first` .. `last - 1` of an objective's order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """One thing to be good at, and the examples for it in the order of the budgets; `source` names the data."""

    name: str
    measure: Measure
    source: str
    examples: tuple[Example, ...]

    @property
    def sha256(self) -> str:
        """Over the examples, in order."""
        return examples_hash(self.examples)

    def count(self, budget: int) -> int:
        """How many examples a budget takes."""
        return min(budget, len(self.examples))

    def batches(self, segment: Segment, *, pack: bool, batch_tokens: int) -> tuple[Batch, ...]:
        """A segment's requests, numbered from its first example's first."""
        requests = [request for example in self.examples[slice(*segment)] for request in example.requests]
        # Packed rows carry masks, which windows and targets, alone in their rows, do not need.
        packed = pack and self.measure in QUESTIONS
        return tuple(batches_of(requests, pack=packed, batch_tokens=batch_tokens))

    def scores(self, values_R: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Each example's score, to be minimised, from the values of the first examples' requests, in order.

        Args:
            values_R: log-likelihoods, or for `kl` divergences, summed over a request's tokens.
        """
        if self.measure not in QUESTIONS:
            return values_R if self.measure == "kl" else -values_R
        found, start = [], 0
        for example in self.examples:
            if start == len(values_R):
                break
            values = values_R[start : start + len(example.requests)] / np.array(example.characters, dtype=np.float64)
            start += len(example.requests)
            assert example.gold is not None, "a question has a right choice"
            if self.measure == "accuracy":
                found.append(float(np.argmax(values) != example.gold))
            elif self.measure == "margin":
                found.append(float(np.delete(values, example.gold).max() - values[example.gold]))
            else:
                found.append(-float(values[example.gold]))
        return np.array(found)

    def right(self, values_R: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """Of questions, whatever they are measured by, whether each is answered rightly (1 or 0); else None."""
        if self.measure not in QUESTIONS:
            return None
        return 1.0 - replace(self, measure="accuracy").scores(values_R)

    def cost(self, scores: npt.NDArray[np.float64]) -> tuple[float, float]:
        """The cost from the scores of the first examples, and its standard error (0 for one example)."""
        n = len(scores)
        tokens = np.array([float(example.tokens) for example in self.examples[:n]])
        weights = np.ones(n) if self.measure in QUESTIONS else tokens
        mean = math.fsum(scores) / math.fsum(weights)
        if n < 2:
            return mean, 0.0
        residuals = scores - mean * weights
        return mean, math.sqrt(math.fsum(residuals**2) / (n * (n - 1))) / float(weights.mean())


def segments(count: int, cuts: Sequence[int]) -> Iterator[Segment]:
    """The first `count` examples, cut at every cut among them."""
    ends = sorted({cut for cut in cuts if 0 < cut < count} | {count})
    yield from zip([0, *ends[:-1]], ends, strict=True)


def cuts_of(least: int, most: int, eta: int) -> tuple[int, ...]:
    """Where budgets are expected: `most` and what is left of it by each division by eta, down to `least`; ascending.

    Both the number rounded down and the nearest are among them, for searchers differ in what they take.
    """
    found = {least, most}
    budget = float(most)
    while budget / eta >= least:
        budget /= eta
        found |= {math.floor(budget), round(budget)}
    return tuple(sorted(found))


def check_budgets(objectives: Sequence[Objective], most: int) -> None:
    """Refuse a budget that no objective has the examples for.

    Raises:
        UserError: naming what there is.
    """
    sizes = {objective.name: len(objective.examples) for objective in objectives}
    if most <= max(sizes.values()):
        return
    there = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    raise UserError.of(
        where="search.max_budget",
        expected=f"at most {max(sizes.values())}, the examples of the largest objective",
        found=f"{most} ({there})",
        remedy="Lower max_budget, or widen a split.",
    )


def check_varied(objectives: Sequence[Objective], scores: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Refuse objectives that tell nothing: every example alike, or the same score for the base on each of several.

    Args:
        scores: of the base, by objective.

    Raises:
        UserError: naming all of them.
    """
    problems = []
    for objective in objectives:
        found = scores[objective.name]
        where = f"objective {objective.name} ({objective.source})"
        if len(objective.examples) > 1 and len({example.requests for example in objective.examples}) == 1:
            problems.append(_same(where, f"the same one {len(objective.examples)} times", "Give it other data."))
        elif objective.measure == "accuracy" and len(found) > 1 and len(set(found.tolist())) == 1:
            answer = "wrong" if found[0] else "right"
            remedy = "Use metric: likelihood or metric: margin, which tell more, or other questions."
            problems.append(_same(where, f"the base's answer is {answer} to each of {len(found)}", remedy))
        elif objective.measure != "kl" and len(found) > 1 and float(np.ptp(found)) == 0.0:
            problems.append(_same(where, f"the same score for each of {len(found)}", "Give it other data."))
    if problems:
        raise UserError(problems)


def _same(where: str, found: str, remedy: str) -> Problem:
    return Problem(where=where, expected="examples that tell models apart", found=found, remedy=remedy)
