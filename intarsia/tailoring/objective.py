"""What a candidate is measured by: examples, how their likelihoods become a cost, and the batches of every budget.

A question is scored by l_c, the log-likelihood of choice c divided by its characters, as `acc_norm` is:

- `accuracy`: 1 - the share of questions whose right choice has the largest l_c;
- `margin`: the mean of max over the wrong choices of l_c, minus l of the right one;
- `likelihood`: the mean of -l of the right one.

The last two are smooth, and tell candidates apart on fewer questions. `loss` is the mean negative log-likelihood of a
token (of targets given their queries, or of windows of text), `kl` the mean divergence from the base of a token's
distribution, both over all tokens, so that an example counts by its length.

Examples are batched by length within segments of the order: between two neighbouring budgets of the search, the cuts.
So a candidate that is tried again on a larger budget is run on the examples that are new, and what the cuts are is
all that decides which examples share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from intarsia.errors import Problem, UserError
from intarsia.evaluation.likelihood import Batch, batches_of
from intarsia.tailoring.examples import Example, examples_hash

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
