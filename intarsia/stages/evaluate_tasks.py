"""Evaluate on tasks: what a model gets right, and how much of another model's accuracy it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from intarsia.building.loaded_model import load_model
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError
from intarsia.evaluation.retention import retention
from intarsia.evaluation.task_plan import TaskPlan, plan_tasks, score_tasks
from intarsia.evaluation.task_results import TaskResults
from intarsia.progress import Progress, Silent
from intarsia.stages.setup import device_of, dtype_of, load_tokenizer

Loaded = tuple[torch.nn.Module, Any]
"""A causal language model of transformers, and its tokenizer."""


def evaluate_tasks(
    model: str | Loaded,
    tasks: str | Sequence[str] | TaskPlan,
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    batch_tokens: int | None = None,
    against: str | Loaded | TaskResults | None = None,
    seed: int = 0,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> TaskResults:
    """Accuracy of a model on tasks; with `against`, also what it keeps of that model's, on the same items.

    Args:
        model: a local folder, a hub id, `demo`, or a model in memory with its tokenizer.
        tasks: local files of `query`, `choices` and `gold` (`piqa.jsonl`; `piqa.jsonl#0.33:1` is the last two thirds),
            names of lm-eval's tasks, groups and tags, or a plan that was made before; one string may name several,
            separated by commas.
        limit: the first so many items of each task.
        include_path: a folder with YAML tasks for lm-eval.
        num_fewshot: examples before each question, for lm-eval's tasks.
        batch_tokens: tokens a forward pass; None for a default by device.
        against: the model to compare with, or what it scored on these tasks before.
        seed: of the bootstrap draws of retention.
        name: what the model is called in the results; None for what names it.
        revision: branch, tag or commit of a hub model (of `model` only).

    Raises:
        UserError: a model or a task cannot be used, or the items of the two results differ.
    """
    progress = progress or Silent()
    where, kind = device_of(device), dtype_of(dtype)
    if isinstance(tasks, TaskPlan):
        plan = tasks
    else:
        given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
        plan = plan_tasks(given, limit=limit, include_path=include_path, num_fewshot=num_fewshot)
    first = _Model(model, name=name, revision=revision, progress=progress)
    second = None if against is None or isinstance(against, TaskResults) else _Model(against, progress=progress)
    results = first.score(plan, where, kind, batch_tokens, progress)
    if against is None:
        return results
    dense = second.score(plan, where, kind, batch_tokens, progress) if second is not None else against
    assert isinstance(dense, TaskResults)
    return replace(results, retention=retention(dense.scores, results.scores, against=dense.model, seed=seed))


class _Model:
    """A model to be scored: checked now, loaded when its turn comes, and let go of behind it."""

    def __init__(
        self,
        model: str | Loaded,
        *,
        progress: Progress,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        self._checkpoint: Checkpoint | None = None
        self._loaded: torch.nn.Module | None = None
        if isinstance(model, str):
            self._checkpoint = open_checkpoint(model, revision=revision, progress=progress)
            self._tokenizer = load_tokenizer(self._checkpoint)
            self._name = name or model
        else:
            self._loaded, self._tokenizer = model
            config = getattr(self._loaded, "config", None)
            self._name = name or getattr(config, "name_or_path", None) or "a model in memory"
            if self._tokenizer is None:
                raise UserError.of(
                    where=self._name,
                    expected="a model with its tokenizer",
                    found="no tokenizer",
                    remedy="Pass (model, tokenizer).",
                )

    def score(
        self,
        plan: TaskPlan,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_tokens: int | None,
        progress: Progress,
    ) -> TaskResults:
        model = self._loaded
        if model is None:
            assert self._checkpoint is not None
            scan(self._checkpoint, progress)
            model = load_model(self._checkpoint, device=device, dtype=dtype)
        return score_tasks(plan, model, self._tokenizer, name=self._name, batch_tokens=batch_tokens, progress=progress)
