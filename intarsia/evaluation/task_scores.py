"""What lm-eval returns, as scores of tasks with the outcome of every item."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from intarsia.evaluation.results import Metric, TaskScore

_SAME = 1e-9  # two ways to sum the same outcomes


def scores_of(name: str, answer: Mapping[str, Any], *, local: bool) -> list[TaskScore]:
    """Scores from lm-eval's results, with every item's (`samples`).

    Args:
        name: of the task or group.
        local: whether it is a file of the user's.

    Returns:
        One score for a task, or for a group with a mean of its own; else one for every task in it.
    """
    parts = [_score(each, answer, local=local) for each in answer["samples"]]
    metrics = _metrics(answer.get("groups", {}).get(name, {}))
    return [_group_score(name, metrics, parts, answer)] if metrics else parts


def _score(name: str, answer: Mapping[str, Any], *, local: bool) -> TaskScore:
    samples = answer["samples"][name]
    metrics = _metrics(answer["results"][name])
    items = list({sample["doc_id"]: sample for sample in samples}.values())  # with several filters a sample a filter
    chance = None
    if answer["configs"][name].get("output_type") == "multiple_choice":
        asked = 2 if any("acc_mutual_info" in item["metrics"] for item in items) else 1  # each choice, also alone
        chance = sum(asked / len(item["arguments"]) for item in items) / len(items)
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item['doc_hash']} {item['target_hash']} {item['arguments']!r}\n".encode())
    return TaskScore(
        name=name,
        metrics=metrics,
        n=len(items),
        chance=chance,
        outcomes=_outcomes(metrics, samples),
        items_sha256=digest.hexdigest(),
        source="local" if local else f"lm-eval {version('lm_eval')}",
        version=None if local else str(answer["versions"].get(name)),
    )


def _group_score(
    name: str, metrics: Mapping[str, Metric], parts: Sequence[TaskScore], answer: Mapping[str, Any]
) -> TaskScore:
    """A group as lm-eval aggregates it. Items are those of all its tasks; a metric keeps their outcomes if it is their
    mean (weighted by size, as MMLU's)."""
    parts = sorted(parts, key=lambda part: part.name)
    n = sum(part.n for part in parts)
    outcomes = {}
    for metric, whole in metrics.items():
        if all(metric in part.outcomes for part in parts):
            joined = tuple(value for part in parts for value in part.outcomes[metric])
            if abs(sum(joined) / n - whole.value) < _SAME:
                outcomes[metric] = joined
    known = [part.chance * part.n for part in parts if part.chance is not None]
    items = "\n".join(f"{part.name} {part.items_sha256}" for part in parts)
    return TaskScore(
        name=name,
        metrics=metrics,
        n=n,
        chance=sum(known) / n if len(known) == len(parts) else None,
        outcomes=outcomes,
        items_sha256=hashlib.sha256(items.encode()).hexdigest(),
        source=parts[0].source,
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
