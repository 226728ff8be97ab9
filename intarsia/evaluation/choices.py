"""Multiple choice and targets: what items are, and how log-likelihoods become scores.

A choice is scored as the continuation " " + choice behind the query. `acc` takes the choice with the largest
log-likelihood; `acc_norm` the one with the largest log-likelihood divided by the number of its characters (lm-eval's
definition); of equal ones the first. Targets are what searches take the loss of (`intarsia.tailoring`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.evaluation.likelihood import Request, encode_pairs
from intarsia.evaluation.run_rows import score_requests
from intarsia.evaluation.score import Metric, TaskScore
from intarsia.progress import Progress


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


@dataclass(frozen=True, kw_only=True)
class ChoiceSet:
    """Questions as a model's requests, pinned: `requests` has every question's choices in order."""

    name: str
    questions: tuple[Question, ...]
    requests: tuple[Request, ...]
    sha256: str

    def score(self, sums_R: Tensor) -> TaskScore:
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
            source="local",
        )


def choice_set(name: str, questions: Sequence[Question], tokenizer: Any, *, max_length: int | None = None) -> ChoiceSet:
    """Questions tokenised for one model; see `encode_pairs` for the arguments and errors."""
    pairs = [(question.query, " " + choice) for question in questions for choice in question.choices]
    return ChoiceSet(
        name=name,
        questions=tuple(questions),
        requests=encode_pairs(pairs, tokenizer, max_length=max_length, where=name),
        sha256=_items_hash(questions),
    )


def score_items(
    model: torch.nn.Module, items: ChoiceSet, *, batch_tokens: int | None = None, progress: Progress | None = None
) -> TaskScore:
    """What a causal language model of transformers scores on questions.

    Raises:
        UserError: a log-likelihood is not finite.
    """
    found = score_requests(model, items.requests, batch_tokens=batch_tokens, where=items.name, progress=progress)
    return items.score(found.sums_R)


def _items_hash(questions: Sequence[Question]) -> str:
    """SHA-256 over the questions' text and right answers, in order; the same for every model."""
    digest = hashlib.sha256()
    for item in questions:
        digest.update(json.dumps(asdict(item), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
