"""What lm-eval answers, as scores: plain mappings in, nothing of lm-eval itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intarsia.evaluation.score import Metric, TaskScore

_SAME = 1e-9  # two ways to sum the same outcomes


def scores_of(name: str, answer: Mapping[str, Any], *, source: str) -> tuple[TaskScore, ...]:
    """The scores of what was asked for by one name.

    Args:
        name: of a task, group or tag.
        answer: lm-eval's results of it alone, with every item's (`samples`).
        source: lm-eval's version.

    Returns:
        One score for a task, or for a group with a mean of its own; else one for every task in it.
    """
    if name in answer.get("groups", {}):
        whole = _group_score(name, answer, source)
        if whole is not None:
            return (whole,)
    return tuple(_task_score(task, answer, source) for task in answer["samples"])


def _task_score(name: str, answer: Mapping[str, Any], source: str) -> TaskScore:
    samples = answer["samples"][name]
    metrics = _metrics(answer["results"][name])
    first = _distinct(samples)
    return TaskScore(
        name=name,
        metrics=metrics,
        n=len(first),
        chance=_chance(first, answer["configs"][name]),
        outcomes=_outcomes(metrics, samples),
        items_sha256=_items_hash(first),
        source=source,
        version=str(answer["versions"].get(name)),
    )


def _group_score(name: str, answer: Mapping[str, Any], source: str) -> TaskScore | None:
    """A group as lm-eval aggregates it; None if it has no metric of its own.

    Items are those of all its tasks. A metric keeps their outcomes if it is their mean (weighted by size, as MMLU's).
    """
    metrics = _metrics(answer["groups"][name])
    if not metrics:
        return None
    parts = [_task_score(task, answer, source) for task in sorted(answer["samples"])]
    n = sum(part.n for part in parts)
    outcomes = {}
    for metric, whole in metrics.items():
        if all(metric in part.outcomes for part in parts):
            joined = tuple(value for part in parts for value in part.outcomes[metric])
            if abs(sum(joined) / n - whole.value) < _SAME:
                outcomes[metric] = joined
    known = [part.chance * part.n for part in parts if part.chance is not None]
    digest = hashlib.sha256("\n".join(f"{part.name} {part.items_sha256}" for part in parts).encode())
    return TaskScore(
        name=name,
        metrics=metrics,
        n=n,
        chance=sum(known) / n if len(known) == len(parts) else None,
        outcomes=outcomes,
        items_sha256=digest.hexdigest(),
        source=source,
        version=str(answer["versions"].get(name)),
    )


def _metrics(row: Mapping[str, Any]) -> dict[str, Metric]:
    """`acc,none` and `acc_stderr,none` become `acc`; a filter's name stays: `exact_match,flexible-extract`."""
    found = {}
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{chosen}")
        stderr = float(error) if isinstance(error, int | float) and np.isfinite(error) else None
        found[metric if chosen == "none" else key] = Metric(value=float(value), stderr=stderr)
    return found


def _outcomes(metrics: Mapping[str, Metric], samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """Item by item, for every metric that is the mean of them."""
    found = {}
    for name, metric in metrics.items():
        key, _, chosen = name.partition(",")
        values = [sample.get(key) for sample in samples if sample["filter"] == (chosen or "none")]
        if values and all(isinstance(value, int | float | np.number) for value in values):
            numbers = tuple(float(value) for value in values if value is not None)
            if abs(sum(numbers) / len(numbers) - metric.value) < _SAME:
                found[name] = numbers
    return found


def _distinct(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every item once: with several filters each has a sample a filter."""
    return list({sample["doc_id"]: sample for sample in reversed(samples)}.values())[::-1]


def _chance(samples: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> float | None:
    if config.get("output_type") != "multiple_choice":
        return None
    asked = 2 if any("acc_mutual_info" in sample["metrics"] for sample in samples) else 1  # each choice, also alone
    return sum(asked / len(sample["arguments"]) for sample in samples) / len(samples)


def _items_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """Over every item's data, prompts and right answer."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample['doc_hash']} {sample['target_hash']} {sample['arguments']!r}\n".encode())
    return digest.hexdigest()
