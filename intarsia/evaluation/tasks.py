"""Tasks, run by lm-eval (EleutherAI's language model evaluation harness) on a model in memory.

Data sets, prompts, few-shot examples, filters, metrics and generation are lm-eval's; a local file of questions becomes
one of its tasks. Log-likelihoods are ours (`intarsia.evaluation.likelihood`): the same numbers in half the time,
because shared contexts are computed once; and normalised in float32, while lm-eval's own loop rounds log-probabilities
to the model's dtype, which causes ties in bfloat16.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intarsia.data.corpus import check_ids
from intarsia.errors import Problems, UserError, check, missing_package
from intarsia.evaluation.likelihood import Request, evaluating, fit, score_requests
from intarsia.evaluation.results import Metric, TaskResults, TaskScore
from intarsia.evaluation.task_file import Question, Solved, is_right, names_a_file, read_items, wants_text
from intarsia.options import TextsAndTasks
from intarsia.progress import without_bars

_SAME = 1e-9  # difference between two sums of the same outcomes
_SEED = 1234  # lm-eval's own for few-shot examples, for the same prompts as in published results
_DRAWS = 1000  # for the standard error of metrics that are not means
_NEAREST = 5
_MOST_WRITTEN = 256  # tokens of an answer
_ROWS_WRITTEN = 8  # answers generated side by side


def scores_of(name: str, answer: Mapping[str, Any], *, local: bool) -> list[TaskScore]:
    """Scores from lm-eval's results, including those of items (`samples`).

    Args:
        local: whether it is a local file.

    Returns:
        One score for a task, or for a group with its own mean; else one for every task in it.
    """
    parts = [_score(each, answer, local=local) for each in answer["samples"]]
    metrics = _metrics(answer.get("groups", {}).get(name, {}))
    return [_group_score(name, metrics, parts, answer)] if metrics else parts


def _score(name: str, answer: Mapping[str, Any], *, local: bool) -> TaskScore:
    samples = answer["samples"][name]
    metrics = _metrics(answer["results"][name])
    items = list({sample["doc_id"]: sample for sample in samples}.values())  # several filters give several samples
    chance = None
    if answer["configs"][name].get("output_type") == "multiple_choice":
        asked = (
            2 if any("acc_mutual_info" in item["metrics"] for item in items) else 1
        )  # each choice, also without context
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
    """The score of a group, aggregated by lm-eval. Items are those of all its tasks; a metric keeps their outcomes if
    it is their mean (weighted by size, as in MMLU)."""
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
    """Outcomes of items, for every metric that is their mean."""
    found = {}
    for name, metric in metrics.items():
        key, _, chosen = name.partition(",")
        values = [sample.get(key) for sample in samples if sample["filter"] == (chosen or "none")]
        if values and all(isinstance(value, int | float | np.number) for value in values):
            numbers = tuple(float(value) for value in values if value is not None)
            if abs(sum(numbers) / len(numbers) - metric.value) < _SAME:
                found[name] = numbers
    return found


@dataclass(frozen=True, kw_only=True)
class Task:
    """A requested task with its data."""

    # Its name; for a file the stem and the part.
    name: str
    # lm-eval's object: a task, a group, or the tasks of a tag.
    found: Mapping[str, Any]
    # Whether it is a local file.
    questions: tuple[Question | Solved, ...] = ()

    @property
    def leaves(self) -> tuple[Any, ...]:
        return tuple(self.found["tasks"].values())


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Tasks in the requested order, to score any number of models."""

    tasks: tuple[Task, ...]
    # The first items of each; None for all.
    limit: int | None
    # Few-shot examples; None for the tasks' own number.
    num_fewshot: int | None
    # Format prompts with the model's chat template.
    chat: bool = False

    @classmethod
    def of(cls, spec: TextsAndTasks, tokenizer: Any) -> TaskPlan | None:
        """The requested tasks, checked against a model's tokenizer; None for none.

        Raises:
            UserError: a task cannot be used.
        """
        if not spec.tasks:
            return None
        plan = plan_tasks(spec.tasks, limit=spec.limit, include_path=spec.include_path, chat=spec.chat_template)
        plan.check_tokens(tokenizer)
        return plan

    def check_tokens(self, tokenizer: Any) -> None:
        """Refuse items with a token without an embedding in the model (`intarsia.data.corpus.limited`).

        Raises:
            UserError: there is one.
        """
        rows = getattr(tokenizer, "embedding_rows", None)
        if rows is None or max(tokenizer.get_vocab().values(), default=0) < rows:
            return
        with _quiet():
            for name, leaf in ((task.name, leaf) for task in self.tasks for leaf in task.leaves):
                leaf.build_all_requests(limit=self.limit, rank=0, world_size=1)
                texts = [text for each in leaf.instances for text in each.args if isinstance(text, str)]
                ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
                check_ids(max((max(row, default=0) for row in ids), default=0), tokenizer, f"The task {name}")


def plan_tasks(
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
) -> TaskPlan:
    """Find tasks and read their items.

    Args:
        tasks: paths of `.jsonl` files, with `#START:END` for a part, and names of lm-eval's tasks, groups and tags.
        limit: number of first items of each (of the part).
        include_path: a folder with additional YAML tasks for lm-eval.
        num_fewshot: few-shot examples, for lm-eval's tasks, and for files of answers from their first items.
        chat: format prompts with the model's chat template.

    Raises:
        UserError: a number is invalid, or a task is unknown, given twice, unreadable or empty.
    """
    files = [spec for spec in tasks if names_a_file(spec)]
    solved = [spec for spec in files if Path(spec.partition("#")[0]).is_file() and wants_text(spec)]
    check(
        (
            bool(tasks) and all(task.strip() for task in tasks),
            "--tasks is empty, or has a blank entry.",
            "Give a task.",
        ),
        (limit is None or limit >= 1, f"--limit is {limit}; it must be at least 1.", "Leave it out for all items."),
        (
            num_fewshot is None or num_fewshot >= 0,
            f"--num-fewshot is {num_fewshot}; it must be at least 0.",
            "Leave it out for the task's own number.",
        ),
        (
            not num_fewshot or not tasks or len(files) - len(solved) < len(tasks),
            "--num-fewshot is given, but local files with choices have no few-shot examples.",
            "Leave it out, or give a task of lm-eval.",
        ),
    )
    found = {spec: _local(*read_items(spec, Question, limit=limit)) for spec in files if spec not in solved}
    found |= {spec: _solved(spec, limit, num_fewshot or 0, chat=chat) for spec in solved}
    others = [name for name in tasks if name not in found]
    if others:
        found |= {task.name: task for task in load_tasks(others, include_path=include_path, num_fewshot=num_fewshot)}
    planned = tuple(found[spec] for spec in tasks)
    names = [task.name for task in planned]
    twice = sorted({name for name in names if names.count(name) > 1})
    check((not twice, f"--tasks has {', '.join(twice)} more than once.", "Leave one out, or rename its file."))
    return TaskPlan(tasks=planned, limit=limit, num_fewshot=num_fewshot, chat=chat)


def score_tasks(
    plan: TaskPlan, model: torch.nn.Module, tokenizer: Any, *, name: str, batch_tokens: int | None = None
) -> TaskResults:
    """Score a model on every task of a plan.

    Args:
        model: a causal language model of transformers, on its device and in its dtype.
        tokenizer: the model's own; it is not changed.
        batch_tokens: tokens a forward pass; None for a default by device.

    Raises:
        UserError: a log-likelihood is not finite, or lm-eval cannot run a task on this model.
    """
    if plan.chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"--chat-template is given, but {name} has no chat template.", "Leave it out.")
    form: dict[str, Any] = {"apply_chat_template": True, "fewshot_as_multiturn": True} if plan.chat else {}
    lm_eval = _lm_eval()
    scores: list[TaskScore] = []
    for task in plan.tasks:
        with _quiet(), _own_chance(), evaluating(model):
            lm = _in_memory(model, tokenizer, task.name, batch_tokens)
            try:
                answer = lm_eval.evaluator.evaluate(lm, task.found, limit=plan.limit, bootstrap_iters=_DRAWS, **form)
            except UserError:
                raise
            except (ValueError, NotImplementedError) as error:  # unsafe code, images, or an unsupported kind of request
                raise UserError(
                    f"lm-eval cannot run the task {task.name} on this model: {_first_line(error)}.", "Leave it out."
                ) from error
        scores += scores_of(task.name, answer, local=bool(task.questions))
    return TaskResults(
        model=name,
        scores=tuple(scores),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        limit=plan.limit,
        num_fewshot=plan.num_fewshot,
    )


def load_tasks(
    names: Sequence[str], *, include_path: str | Path | None = None, num_fewshot: int | None = None
) -> tuple[Task, ...]:
    """Find tasks of lm-eval and load their data sets, downloading them if needed.

    Args:
        names: of tasks, groups or tags of lm-eval.
        include_path: a folder with additional YAML tasks.
        num_fewshot: few-shot examples; None for the tasks' own number. Tasks that fix 0 keep it.

    Raises:
        UserError: lm-eval is not installed, a name is unknown, a data set cannot be loaded, or a task has no items.
    """
    folder = None if include_path is None else str(include_path)
    no_folder = folder is not None and not Path(folder).is_dir()
    check((not no_folder, f"--include-path {folder} is not a folder.", "Give one with YAML tasks."))
    with _quiet(), _own_chance():
        make = _lm_eval().tasks.TaskManager
        # Listing its own tasks takes seconds; skip it if the user's folder is enough.
        alone = None if folder is None else make(include_path=folder, include_defaults=False)
        manager = alone if alone and set(names) <= set(alone.all_subtasks) else make(include_path=folder)
        problems = Problems()
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=_NEAREST, cutoff=0.5)
                hint = f"Did you mean {', '.join(near)}?" if near else "See `lm-eval ls tasks`, or give a .jsonl."
                problems.add(f"There is no task {name!r}.", hint)
        problems.raise_any()
        tasks = tuple(_load(name, manager) for name in names)
        for leaf in (leaf for task in tasks for leaf in task.leaves):
            # As in lm-eval's command: the default is 0, and tasks that fix 0 keep it.
            fixed = leaf.get_config("num_fewshot")
            if fixed is None or (num_fewshot is not None and fixed != 0):
                leaf.set_config(key="num_fewshot", value=num_fewshot or 0)
            leaf.set_fewshot_seed(seed=_SEED)
    return tasks


def _local(name: str, questions: tuple[Question, ...]) -> Task:
    """Questions of a file as a task of lm-eval: a choice is scored as the continuation " " + choice of the query."""
    config = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    }
    return _task(name, {"test": questions}, config)


def _solved(spec: str, limit: int | None, examples: int, *, chat: bool) -> Task:
    """A file of answers as a task of lm-eval: greedy generation, without a chat template up to an empty line.

    Its first items are the few-shot examples, and are not scored.
    """
    name, items = read_items(spec, Solved, limit=None if limit is None else limit + examples)
    check(
        (
            len(items) > examples,
            f"--num-fewshot is {examples}, but {spec} has {len(items)} items.",
            "Give fewer examples, or a longer file.",
        )
    )

    def score(item: Mapping[str, Any], written: Sequence[str]) -> dict[str, float]:
        return {"exact_match": float(is_right(written[0], item["answer"]))}

    config: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "process_results": score,
        "generation_kwargs": {"until": [] if chat else ["\n\n"], "max_gen_toks": _MOST_WRITTEN, "do_sample": False},
        "num_fewshot": examples,
        "metric_list": [_mean("exact_match")],
    }
    parts = {"test": items[examples:]}
    if examples:
        parts["train"] = items[:examples]
        config |= {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    return _task(name, parts, config)


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _task(name: str, parts: Mapping[str, Sequence[Question | Solved]], config: Mapping[str, Any]) -> Task:
    """Items of a file as a task of lm-eval, which uses the part `test`."""
    _lm_eval()
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def data(**_: Any) -> dict[str, Any]:
        return {part: Dataset.from_list([each.model_dump() for each in items]) for part, items in parts.items()}

    whole = {"task": name, "custom_dataset": data, "test_split": "test", "doc_to_text": "query", **config}
    with _quiet(), _own_chance():
        task = ConfigurableTask(config=whole)
    found = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    return Task(name=name, found=found, questions=tuple(parts["test"]))


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise missing_package("lm-eval", where="tasks", extra="tasks", error=error) from error
    return lm_eval


def _in_memory(model: torch.nn.Module, tokenizer: Any, name: str, batch_tokens: int | None) -> Any:
    """A model in memory as lm-eval's model class, with our own log-likelihoods."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        """lm-eval's class with our own log-likelihoods."""

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            for each in requests:  # leave half of the positions to the prompt
                context, how = each.arguments
                most = min(how.get("max_gen_toks", self.max_gen_toks), self.max_length // 2)
                each.arguments = (context, {**how, "max_gen_toks": most})
            written: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
            return written

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # ours is shown
            return found

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            for (_, text), _, tokens in requests:
                check(
                    (
                        1 <= len(tokens) <= self.max_length,
                        f"The task {name} scores the text {text[:40]!r}, which has {len(tokens)} tokens of its own.",
                        f"It needs 1 to {self.max_length} (the model's positions); correct this item.",
                    )
                )
            wanted = [
                fit(Request(context=tuple(context), continuation=tuple(continuation)), self.max_length)
                for _, context, continuation in requests
            ]
            found = score_requests(model, wanted, batch_tokens=batch_tokens, where=name)
            return list(zip(found.sums_R.tolist(), found.greedy_R.tolist(), strict=True))

    # lm-eval sets a padding token on the given tokenizer.
    return InMemory(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=_ROWS_WRITTEN)


def _load(name: str, manager: Any) -> Task:
    """Load a task; errors may come from a YAML file, a data set's code, `datasets`, or the hub's HTTP client, so catch
    all."""
    try:
        task = Task(name=name, found=manager.load([name]))
        empty = [str(leaf.config.task) for leaf in task.leaves if len(leaf.eval_docs) == 0]
    except ImportError as error:
        raise UserError(
            f"The task {name} needs a package that is not installed ({_first_line(error)}).",
            "Install it; `pip install 'lm-eval[NAME]'` has those of a kind of tasks.",
        ) from error
    except Exception as error:
        raise UserError(
            f"The data set of the task {name} cannot be read ({type(error).__name__}: {_first_line(error)}).",
            "Check the connection (HF_HUB_OFFLINE, HF_TOKEN) and the task's YAML, or give a .jsonl of questions.",
        ) from error
    check((not empty, f"The task {name} has no items in {', '.join(empty)}.", "Check its data set and split."))
    return task


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's bars and its log below errors, and send output of its tasks' code to stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr), without_bars("lm_eval.api.task"):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _own_chance() -> Iterator[None]:
    """Seed shuffles of tasks as in lm-eval's command, and restore the random state."""
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
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
