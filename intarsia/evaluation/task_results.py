"""What a model scores on several tasks, and what it keeps of another model's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intarsia.evaluation.retention import Retention
from intarsia.evaluation.score import TaskScore


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """A model's scores on several tasks, and what it retains of another model's (`retention`, if one was given).

    `limit`, `num_fewshot` and `dtype` are those of the run.
    """

    model: str
    scores: tuple[TaskScore, ...]
    dtype: str
    limit: int | None = None
    num_fewshot: int | None = None
    retention: Retention | None = None

    @property
    def mean(self) -> float:
        """Mean of the tasks' primary metrics, every task counting the same."""
        return math.fsum(score.value for score in self.scores) / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "mean": self.mean,
            "scores": [score.to_dict() for score in self.scores],
            "retention": None if self.retention is None else self.retention.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResults:
        """The results that `to_dict` wrote."""
        kept = data["retention"]
        return cls(
            model=data["model"],
            scores=tuple(TaskScore.from_dict(score) for score in data["scores"]),
            dtype=data["dtype"],
            limit=data["limit"],
            num_fewshot=data["num_fewshot"],
            retention=None if kept is None else Retention.from_dict(kept),
        )
