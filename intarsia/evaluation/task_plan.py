"""Several tasks, found and read before a model is loaded, then scored on any number of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intarsia.errors import Problem, UserError
from intarsia.evaluation.choices import Question, choice_set, score_items
from intarsia.evaluation.likelihood import positions_of
from intarsia.evaluation.score import TaskScore
from intarsia.evaluation.task_file import names_a_file, read_questions
from intarsia.evaluation.task_results import TaskResults
from intarsia.evaluation.tasks import HarnessTask, load_harness, run_harness
from intarsia.progress import Progress, Silent


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """The questions of a local file, or of its part."""

    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Tasks in the order they were asked for."""

    tasks: tuple[LocalTask | HarnessTask, ...]
    limit: int | None
    num_fewshot: int | None


def plan_tasks(
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
) -> TaskPlan:
    """Find tasks and read their items.

    Args:
        tasks: paths of `.jsonl` files, with `#START:END` for a part, and names of lm-eval's tasks.
        limit: the first so many items of each (of the part).
        include_path: a folder with YAML tasks of the user's, for lm-eval.
        num_fewshot: examples before each question, for lm-eval's tasks.

    Raises:
        UserError: a number is impossible, a task is unknown, named twice, cannot be read or has no items.
    """
    _check(tasks, limit, num_fewshot)
    local: dict[str, LocalTask] = {}
    for spec in filter(names_a_file, tasks):
        name, questions = read_questions(spec, limit=limit)
        local[spec] = LocalTask(name=name, questions=questions)
    others = [name for name in tasks if name not in local]
    found = load_harness(others, include_path=include_path, num_fewshot=num_fewshot) if others else ()
    harness = {task.name: task for task in found}
    planned = tuple(local[spec] if spec in local else harness[spec] for spec in tasks)
    names = [task.name for task in planned]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError.of(
            where="--tasks",
            expected="tasks of different names",
            found=f"{', '.join(twice)} more than once",
            remedy="Leave the second one out, or rename its file.",
        )
    return TaskPlan(tasks=planned, limit=limit, num_fewshot=num_fewshot)


def score_tasks(
    plan: TaskPlan,
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    name: str,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> TaskResults:
    """A model's scores on every task of a plan.

    Args:
        model: a causal language model of transformers, where it is and in its own dtype.
        tokenizer: its own.
        name: what the model is called in the results.
        batch_tokens: tokens a forward pass; None for a default by device.

    Raises:
        UserError: a log-likelihood is not finite, or lm-eval cannot run a task on this model.
    """
    progress = progress or Silent()
    scores: list[TaskScore] = []
    for task in plan.tasks:
        if isinstance(task, LocalTask):
            positions = positions_of(getattr(model, "config", None))
            items = choice_set(task.name, task.questions, tokenizer, max_length=positions)
            scores.append(score_items(model, items, batch_tokens=batch_tokens, progress=progress))
        else:
            scores.extend(
                run_harness(task, model, tokenizer, limit=plan.limit, batch_tokens=batch_tokens, progress=progress)
            )
    return TaskResults(
        model=name,
        scores=tuple(scores),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        limit=plan.limit,
        num_fewshot=plan.num_fewshot,
    )


def _check(tasks: Sequence[str], limit: int | None, num_fewshot: int | None) -> None:
    problems = []
    if not tasks or not all(task.strip() for task in tasks):
        problems.append(_problem("--tasks", "at least one task, none of them blank", repr(list(tasks))))
    if limit is not None and limit < 1:
        problems.append(_problem("--limit", "at least 1 item", str(limit)))
    if num_fewshot is not None and num_fewshot < 0:
        problems.append(_problem("--num-fewshot", "0 or more examples", str(num_fewshot)))
    if num_fewshot and tasks and all(map(names_a_file, tasks)):
        problems.append(_problem("--num-fewshot", "a task of lm-eval", "local files, whose prompts are what they are"))
    if problems:
        raise UserError(problems)


def _problem(where: str, expected: str, found: str) -> Problem:
    return Problem(where=where, expected=expected, found=found, remedy="Mend this.")
