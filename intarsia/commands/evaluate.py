"""`intarsia eval`: a model's accuracy on tasks, its perplexity on a text, or its agreement with another model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia.errors import check
from intarsia.evaluation.results import Agreement, Perplexity, TaskResults, retention, with_retention
from intarsia.flags import Flag, Result, flag
from intarsia.options import AnswerSpec, ModelRef, Runtime, words
from intarsia.recipe.recipe import Variant, identity

if TYPE_CHECKING:
    from intarsia.commands.job import Job
    from intarsia.evaluation.tasks import TaskPlan


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Tasks: the questions that a model is scored on."""

    # Names of lm-eval (arc_easy, mmlu, gsm8k, ...), and .jsonl files of query, choices and gold, or of query and answer
    # (the model then writes one); `piqa.jsonl#0.33:1` is the last two thirds of its items.
    tasks: tuple[str, ...] = flag(MISSING, metavar="NAMES")
    # Use only the first N items of each task.
    limit: int | None = flag(None, metavar="N")
    # Folder with lm-eval task definitions of your own.
    include_path: Path | None = flag(None, metavar="DIR")
    # Examples before each question (default: the task's own number); of a file of answers its first items.
    num_fewshot: int | None = flag(None, metavar="K")
    # Write the prompts as conversations, with the model's chat template.
    chat_template: bool = False

    def __post_init__(self) -> None:
        names = (name.strip() for text in words(self.tasks) for name in text.split(","))
        object.__setattr__(self, "tasks", tuple(names))


def evaluate_tasks(
    model: ModelRef | str | Path | tuple[Any, Any],
    tasks: TaskSpec | str | Sequence[str],
    *,
    against: Annotated[
        Any,
        Flag(
            metavar="MODEL",
            help="Reference model: report how much of its accuracy is kept, with 95 % intervals.",
        ),
    ] = None,
    seed: Annotated[int, Flag(metavar="N", help="Random seed of the intervals.")] = 0,
    runtime: Runtime = Runtime(),
) -> TaskResults:
    """Score a model on tasks: those of lm-eval, and local files of questions.

    Args:
        model: a local folder, a hub id, `demo`, or a model in memory with its tokenizer.
        tasks: which, as `TaskSpec(tasks=("arc_easy", "piqa.jsonl"), limit=100)`, or their names alone.
        against: a model as above, or what it scored on these tasks before.

    Raises:
        UserError: a model or a task cannot be used, or the items of the two results differ.
    """
    from intarsia.evaluation.tasks import plan_tasks

    spec = tasks if isinstance(tasks, TaskSpec) else TaskSpec(tasks=words(tasks))
    check_one_device(runtime)
    how: dict[str, Any] = {name: getattr(spec, name) for name in ("limit", "include_path", "num_fewshot")}
    plan = plan_tasks(spec.tasks, chat=spec.chat_template, **how)
    entrant = _Entrant(model, runtime)
    other = None if against is None or isinstance(against, TaskResults) else _Entrant(against, runtime)
    for each in filter(None, (entrant, other)):
        plan.check_tokens(each.tokenizer)
    results = entrant.score(plan)
    if other is not None:
        return with_retention(other.score(plan), results, seed=seed)
    if against is None:
        return results
    return replace(results, retention=retention(against.scores, results.scores, against=against.model, seed=seed))


class _Entrant:
    """A model to be scored: checked at once, loaded for its score alone."""

    def __init__(self, model: Any, runtime: Runtime) -> None:
        from intarsia.commands.job import Job

        self._batch_tokens = runtime.batch_tokens
        if isinstance(model, tuple):
            loaded, self.tokenizer = model
            config = getattr(loaded, "config", None)
            self._load, self._name = lambda: loaded, getattr(config, "name_or_path", None) or "a model in memory"
            check((self.tokenizer is not None, f"{self._name} has no tokenizer.", "Pass (model, tokenizer)."))
        else:
            job = Job(model, runtime=runtime)
            self._load, self._name, self.tokenizer = lambda: load_whole(job), job.model, job.tokenizer

    def score(self, plan: TaskPlan) -> TaskResults:
        from intarsia.evaluation.tasks import score_tasks

        return score_tasks(plan, self._load(), self.tokenizer, name=self._name, batch_tokens=self._batch_tokens)


def load_whole(job: Job) -> Any:
    """A job's model as transformers loads it, or a chain of streamed or spread layers; its weights are checked."""
    from intarsia.building.loaded_model import load_model
    from intarsia.evaluation.perplexity import Chain, model_of

    assert job.sha256, "hashing also checks that all weights are finite"
    if job.runtime.stream:
        return model_of(None, job.resident, memory_budget=job.placement.memory_budget())
    if len(job.placement.devices) > 1:
        whole = identity(Variant(name="base", model=job.model), job.checkpoint.architecture.n_layers)
        return Chain(whole, job.resident)
    return load_model(job.checkpoint, device=job.device, dtype=job.dtype)


def check_one_device(runtime: Runtime) -> None:
    """Refuse a model that is not whole on one device.

    Raises:
        UserError: it is streamed, or spread over several devices.
    """
    check(
        (not runtime.stream, "--stream is for perplexity; here the model is in memory.", "Leave it out."),
        (len(runtime.devices) < 2, "--devices has several; here the model is on one.", "Give one --device."),
    )


def evaluate_perplexity(
    model: ModelRef | str | Path,
    text: Annotated[str, Flag(metavar="FILE", help="Evaluation text; `file.txt#0.9:1` is its last tenth.")],
    *,
    seq_len: Annotated[int, Flag(metavar="N", help="Tokens in a window.")] = 512,
    windows: Annotated[
        int | None, Flag(metavar="N", help="Windows to use, from the start of the text; 0 for all.")
    ] = 64,
    runtime: Runtime = Runtime(),
) -> Perplexity:
    """Measure the perplexity of a model on a text, over windows that do not overlap.

    Raises:
        UserError: the model or the text cannot be used.
    """
    from intarsia.commands.job import Job, check_seq_len
    from intarsia.evaluation.perplexity import eval_corpus, perplexity

    job = Job(model, runtime=runtime)
    check_seq_len(job.checkpoint, seq_len)
    corpus = eval_corpus(text, job.tokenizer, seq_len=seq_len, windows=windows or None)
    batch = {} if runtime.batch_tokens is None else {"batch_tokens": runtime.batch_tokens}
    return perplexity(load_whole(job), corpus, **batch)


@dataclass(frozen=True, kw_only=True)
class AgreementResult(Result):
    """Two models' answers to the same prompts."""

    model: str
    against: str
    # Of the reference model.
    original: Agreement
    agreement: Agreement
    seconds: float

    def summary(self) -> dict[str, Any]:
        """A row a model, without the answers themselves."""
        found = self.agreement
        rows = [{"model": self.against, **self.original.measures()}, {"model": self.model, **found.measures()}]
        prompts = f"{found.prompts} ({found.source})"
        return {"agreement": rows, "prompts": prompts, "tokens": found.tokens, "seconds": self.seconds}


def evaluate_agreement(
    model: ModelRef | str | Path,
    against: Annotated[str, Flag(metavar="MODEL", help="The original: its answers are the reference.")],
    answers: AnswerSpec = AnswerSpec(),
    *,
    seed: Annotated[int, Flag(metavar="N", help="Random seed of prompts that the original writes.")] = 0,
    runtime: Runtime = Runtime(),
) -> AgreementResult:
    """Measure how often a model's next token is the original's, and how the model's own answers are.

    Both answer the same prompts, greedily; with --stream the prompts come with answers. One model is in memory at a
    time.

    Raises:
        UserError: a model or the prompts cannot be used, or the models have different tokenizers.
    """
    from intarsia.commands.job import Job, check_same_tokenizer
    from intarsia.evaluation.agreement import Asked

    started = time.perf_counter()
    check_one_device(replace(runtime, stream=False))
    alone = "--stream is given without --prompts, and a streamed model does not write answers."
    file = "Give --prompts FILE of conversations with answers, or leave --stream out."
    check(
        (answers.answers > 0, "--answers is 0, so there is nothing to measure.", "Give a number of prompts."),
        (answers.prompts is not None or not runtime.stream, alone, file),
    )
    original, small = Job(against, runtime=runtime), Job(model, runtime=runtime)
    check_same_tokenizer(original, small)
    configs = [job.checkpoint.architecture.config for job in (original, small)]
    asked = Asked.of(answers, original.tokenizer, *configs, stream=runtime.stream)
    assert asked is not None
    reference = asked.answered(load_whole(original), seed=seed, key=original.sha256)
    followed = reference.follow(load_whole(small))
    return AgreementResult(
        model=small.model,
        against=original.model,
        original=reference.itself(),
        agreement=reference.score(followed, None if followed.answers is None else load_whole(original)),
        seconds=time.perf_counter() - started,
    )
