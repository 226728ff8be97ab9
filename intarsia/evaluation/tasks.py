"""Tasks of lm-eval (EleutherAI's language model evaluation harness), on a model in memory.

The only file that imports lm-eval. Data sets, prompts, few-shot examples, filters and metrics are the harness's own.
Log-likelihoods are made here (`intarsia.evaluation.run_rows`): the same numbers, with what the choices of a question
share computed once, and normalised in float32, where the harness's own loop rounds log-probabilities to the model's
dtype, which makes ties in bfloat16. Text that a task wants written is written by the harness, greedily or as it says.
"""

from __future__ import annotations

import copy
import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intarsia.errors import Problem, UserError, missing_package
from intarsia.evaluation.likelihood import Request, fit
from intarsia.evaluation.run_rows import evaluating, score_requests
from intarsia.evaluation.score import TaskScore
from intarsia.evaluation.task_answer import scores_of
from intarsia.progress import Progress, Silent

_SEED = 1234  # lm-eval's own for few-shot examples: with another one the prompts would differ from published ones
_DRAWS = 1000  # for the standard error of metrics that are no mean
_NEAREST = 5


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """One name that was asked for: `found` is what lm-eval made of it (a task, a group, or the tasks of a tag), and
    `leaves` are the single tasks in it."""

    name: str
    found: dict[Any, Any]
    leaves: tuple[Any, ...]


def load_harness(
    names: Sequence[str], *, include_path: str | Path | None = None, num_fewshot: int | None = None
) -> tuple[HarnessTask, ...]:
    """Find tasks and load their data sets, which may have to be fetched.

    Args:
        names: of tasks, groups or tags of the harness.
        include_path: a folder with YAML tasks of the user's.
        num_fewshot: examples before each question; None for what the tasks say. Tasks that fix 0 keep it.

    Raises:
        UserError: lm-eval is not installed, a name is unknown, a data set cannot be had, or a task has no items.
    """
    _lm_eval()
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError.of(
            where="--include-path",
            expected="a folder with YAML tasks",
            found=f"no folder {str(include_path)!r}",
            remedy="Check the path.",
        )
    with _quiet(), _own_chance():
        manager = _manager(names, None if include_path is None else str(include_path))
        unknown = [_unknown(name, manager.all_tasks) for name in names if name not in manager.all_tasks]
        if unknown:
            raise UserError(unknown)
        tasks = tuple(_load(name, manager) for name in names)
        for task in tasks:
            for leaf in task.leaves:
                _set_fewshot(leaf, num_fewshot)
    return tasks


def run_harness(
    task: HarnessTask,
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    limit: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[TaskScore, ...]:
    """Scores of a model on a task: one for a task or for a group with a mean of its own, several for others.

    Args:
        model: a causal language model of transformers, where it is and in its own dtype.
        tokenizer: its own; left as it is.
        limit: the first so many items of every task (of every subtask of a group), as the harness counts them.
        batch_tokens: tokens a forward pass; None for a default by device.

    Raises:
        UserError: the harness cannot run the task on this model, or a log-likelihood is not finite.
    """
    lm_eval = _lm_eval()
    with _quiet(), _own_chance(), evaluating(model):
        lm = _in_memory(model, tokenizer, task.name, batch_tokens, progress or Silent())
        try:
            answer = lm_eval.evaluator.evaluate(lm, task.found, limit=limit, bootstrap_iters=_DRAWS)
        except UserError:
            raise
        except (ValueError, NotImplementedError) as error:  # of unsafe code, pictures, or a kind of request
            raise UserError.of(
                where=f"task {task.name}",
                expected="a task that lm-eval can run on a causal language model",
                found=_first_line(error),
                remedy="Leave this task out.",
            ) from error
    return scores_of(task.name, answer, source=f"lm-eval {version('lm_eval')}")


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise missing_package(
            "lm-eval",
            where="tasks of lm-eval",
            extra="tasks",
            instead="pass a local file of query, choices and gold (.jsonl)",
            error=error,
        ) from error
    return lm_eval


def _in_memory(model: torch.nn.Module, tokenizer: Any, name: str, batch_tokens: int | None, progress: Progress) -> Any:
    """The harness's view of a model in memory, with log-likelihoods of our own."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        """Everything but log-likelihoods is the harness's."""

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            wanted = [
                fit(Request(context=tuple(context), continuation=tuple(continuation)), self.max_length)
                for _, context, continuation in requests
            ]
            found = score_requests(model, wanted, batch_tokens=batch_tokens, greedy=True, where=name, progress=progress)
            assert found.greedy_R is not None
            return list(zip(found.sums_R.tolist(), found.greedy_R.tolist(), strict=True))

    # The harness sets a padding token on the tokenizer that it is given.
    return InMemory(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=1)


def _unknown(name: str, known: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(name, known, n=_NEAREST, cutoff=0.5)
    return Problem(
        where=f"task {name!r}",
        expected="a task, group or tag of lm-eval or of --include-path, or a .jsonl file",
        found=f"no such name; the nearest are {', '.join(near)}" if near else "no such name, and none near it",
        remedy="Choose one of them." if near else "`lm-eval ls tasks` lists all names.",
    )


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's list of tasks. Its own take seconds to list, and are left out where the user's folder is enough."""
    make = _lm_eval().tasks.TaskManager
    if include_path is not None:
        alone = make(include_path=include_path, include_defaults=False)
        if set(names) <= set(alone.all_subtasks):
            return alone
    return make(include_path=include_path)


def _load(name: str, manager: Any) -> HarnessTask:
    """What fails here comes from a YAML file, from a data set's code, from `datasets`, or from whatever HTTP client the
    hub's library uses in its present version; so everything is taken."""
    try:
        found = manager.load([name])
        leaves = tuple(found["tasks"].values())
        empty = [leaf.config.task for leaf in leaves if len(leaf.eval_docs) == 0]
    except Exception as error:
        raise UserError.of(
            where=f"task {name}",
            expected="a task whose data set can be read and has items",
            found=f"{type(error).__name__}: {_first_line(error)}",
            remedy="Check the connection (HF_HUB_OFFLINE, HF_TOKEN) and the task's YAML, or pass a local file of "
            "query, choices and gold (.jsonl).",
        ) from error
    if empty:
        raise UserError.of(
            where=f"task {name}",
            expected="at least one item",
            found=f"none in {', '.join(map(str, empty))}",
            remedy="Check the task's data set and split.",
        )
    return HarnessTask(name=name, found=found, leaves=leaves)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As lm-eval's command does it: what a task leaves open is 0, and a 0 that a task fixes stays."""
    fixed = task.get_config("num_fewshot")
    if fixed is None or (num_fewshot is not None and fixed != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_SEED)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells a lot on its logger."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _own_chance() -> Iterator[None]:
    """Tasks that shuffle do it as in lm-eval's command, and nobody else's random numbers change."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(_SEED)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
