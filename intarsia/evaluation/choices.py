"""Multiple choice and targets: what items are, and how log-likelihoods become scores.

A choice is scored as the continuation " " + choice behind the query. `acc` takes the choice with the largest
log-likelihood; `acc_norm` the one with the largest log-likelihood divided by the number of its characters (lm-eval's
definition); of equal ones the first. A target is scored as the continuation that it is, by the loss of its tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from intarsia.evaluation.requests import Request, encode_pairs
from intarsia.evaluation.run_rows import score_requests
from intarsia.evaluation.score import Metric, TaskScore
from intarsia.progress import Progress

Scored = TypeVar("Scored", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A query that is not blank, at least two choices, none empty, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """A query that is not blank, and the text that should follow it."""

    query: str
    target: str


class Items(Protocol[Scored]):
    """Requests to a model, and what their log-likelihoods say."""

    @property
    def name(self) -> str:
        """What they are called."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """What the model is asked."""

    def score(self, sums_R: Tensor) -> Scored:
        """The result, from the log-likelihoods of all requests."""


@dataclass(frozen=True, kw_only=True)
class ChoiceSet:
    """Questions as a model's requests, pinned: `requests` has every question's choices in order."""

    name: str
    questions: tuple[Question, ...]
    requests: tuple[Request, ...]
    sha256: str

    def score(self, sums_R: Tensor, *, source: str = "local") -> TaskScore:
        """acc and acc_norm from the log-likelihoods of all requests."""
        best, best_norm = [], []
        start = 0
        for question in self.questions:
            sums = sums_R[start : start + len(question.choices)].numpy()
            lengths = np.array([float(len(choice)) for choice in question.choices])
            best.append(float(np.argmax(sums) == question.gold))
            best_norm.append(float(np.argmax(sums / lengths) == question.gold))
            start += len(question.choices)
        assert start == len(sums_R)
        outcomes = {"acc": tuple(best), "acc_norm": tuple(best_norm)}
        return TaskScore(
            name=self.name,
            metrics={name: Metric.of(values) for name, values in outcomes.items()},
            n=len(self.questions),
            chance=sum(1 / len(question.choices) for question in self.questions) / len(self.questions),
            outcomes=outcomes,
            items_sha256=self.sha256,
            source=source,
        )


@dataclass(frozen=True, kw_only=True)
class TargetSet:
    """Targets as a model's requests, pinned."""

    name: str
    targets: tuple[Target, ...]
    requests: tuple[Request, ...]
    sha256: str

    def score(self, sums_R: Tensor) -> TargetLoss:
        """The loss from the log-likelihoods of all requests."""
        return TargetLoss(
            name=self.name,
            nll_items=tuple(-value for value in sums_R.tolist()),
            token_items=tuple(len(request.continuation) for request in self.requests),
            items_sha256=self.sha256,
        )


@dataclass(frozen=True, kw_only=True)
class TargetLoss:
    """The loss of targets given their queries: summed (`nll_items`, nats) and number of tokens, item by item."""

    name: str
    nll_items: tuple[float, ...]
    token_items: tuple[int, ...]
    items_sha256: str

    @property
    def tokens(self) -> int:
        """All scored tokens."""
        return sum(self.token_items)

    @property
    def nll(self) -> float:
        """Mean loss a token, in nats."""
        return sum(self.nll_items) / self.tokens


def choice_set(name: str, questions: Sequence[Question], tokenizer: Any, *, max_length: int | None = None) -> ChoiceSet:
    """Questions tokenised for one model; see `encode_pairs` for the arguments and errors."""
    pairs = [(question.query, " " + choice) for question in questions for choice in question.choices]
    return ChoiceSet(
        name=name,
        questions=tuple(questions),
        requests=encode_pairs(pairs, tokenizer, max_length=max_length, where=name),
        sha256=items_hash(questions),
    )


def target_set(name: str, targets: Sequence[Target], tokenizer: Any, *, max_length: int | None = None) -> TargetSet:
    """Targets tokenised for one model; see `encode_pairs` for the arguments and errors."""
    pairs = [(target.query, target.target) for target in targets]
    return TargetSet(
        name=name,
        targets=tuple(targets),
        requests=encode_pairs(pairs, tokenizer, max_length=max_length, where=name),
        sha256=items_hash(targets),
    )


def score_items(
    model: torch.nn.Module, items: Items[Scored], *, batch_tokens: int | None = None, progress: Progress | None = None
) -> Scored:
    """What a causal language model of transformers scores: accuracy on questions, the loss of targets.

    Raises:
        UserError: a log-likelihood is not finite.
    """
    found = score_requests(model, items.requests, batch_tokens=batch_tokens, where=items.name, progress=progress)
    return items.score(found.sums_R)


def items_hash(items: Sequence[Question] | Sequence[Target]) -> str:
    """SHA-256 over the items' text and right answers, in order; the same for every model."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
