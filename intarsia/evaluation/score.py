"""Scores on tasks, item by item, so that two models can be compared on the same items.

Where one number stands for a task (`TaskScore.primary`), it is `acc_norm` if the task has it, else `acc`, else the
first metric: lm-eval's tasks define `acc_norm` where choices differ in length (ARC, HellaSwag, OpenBookQA, PIQA), and
only `acc` where they do not (WinoGrande, MMLU).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PREFERRED = ("acc_norm", "acc")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A mean over items with its standard error (None where the harness gives none)."""

    value: float
    stderr: float | None

    @classmethod
    def of(cls, outcomes: Sequence[float]) -> Metric:
        """From the items' outcomes; a single item has no scatter."""
        n, mean = len(outcomes), math.fsum(outcomes) / len(outcomes)
        spread = math.fsum((value - mean) ** 2 for value in outcomes)
        return cls(value=mean, stderr=math.sqrt(spread / (n - 1) / n) if n > 1 else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "stderr": self.stderr}


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score on one task.

    `metrics` by name; `n` items; `chance`, the mean of 1 / number of choices, None for tasks without choices;
    `outcomes` of every item by metric, in item order, for metrics that are the mean of them; `items_sha256` over the
    items: equal hashes mean the same questions; `source` is `local` or lm-eval's version; `version` the task's own.
    """

    name: str
    metrics: Mapping[str, Metric]
    n: int
    chance: float | None
    outcomes: Mapping[str, tuple[float, ...]]
    items_sha256: str
    source: str
    version: str | None = None

    @property
    def primary(self) -> str:
        """The metric that stands for the task."""
        return next((name for name in _PREFERRED if name in self.metrics), next(iter(self.metrics)))

    @property
    def value(self) -> float:
        """The primary metric's value."""
        return self.metrics[self.primary].value

    def to_dict(self) -> dict[str, Any]:
        """Plain values; outcomes that are all 0 or 1 as a string of digits."""
        return {
            "name": self.name,
            "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()},
            "primary": self.primary,
            "n": self.n,
            "chance": self.chance,
            "source": self.source,
            "version": self.version,
            "items_sha256": self.items_sha256,
            "outcomes": {name: _written(values) for name, values in self.outcomes.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskScore:
        """The score that `to_dict` wrote."""
        return cls(
            name=data["name"],
            metrics={name: Metric(**metric) for name, metric in data["metrics"].items()},
            n=data["n"],
            chance=data["chance"],
            outcomes={name: tuple(map(float, values)) for name, values in data["outcomes"].items()},
            items_sha256=data["items_sha256"],
            source=data["source"],
            version=data["version"],
        )


def _written(values: Sequence[float]) -> str | list[float]:
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else list(values)
