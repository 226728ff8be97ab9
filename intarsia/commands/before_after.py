"""A model and what was made from it, measured alike: perplexity, accuracy on tasks, speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from intarsia import progress
from intarsia.building.loaded_model import LoadedModel, load_model
from intarsia.building.offload import free_bytes
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.compress import Measures
from intarsia.commands.job import Job
from intarsia.data.corpus import Corpus
from intarsia.errors import check
from intarsia.evaluation.perplexity import Chain, eval_corpus, perplexity
from intarsia.evaluation.results import Perplexity, Speed, TaskResults, retention
from intarsia.evaluation.speed import compare_speed
from intarsia.evaluation.tasks import TaskPlan, plan_tasks, score_tasks
from intarsia.options import EvalSpec
from intarsia.recipe.recipe import Recipe, Variant, identity

_SHARE_OF_FREE = 0.8


@dataclass(kw_only=True)
class Evaluation:
    """What is measured before and after, and what came of it."""

    # Texts for perplexity, by name; the first one is the one in the table.
    texts: dict[str, Corpus]
    tasks: TaskPlan | None
    speed: bool
    # Accuracy of the new model on the tasks, and what it kept of the original's.
    accuracy: dict[str, Any] | None = field(default=None, init=False)

    @classmethod
    def of(cls, job: Job, spec: EvalSpec) -> Evaluation:
        """What is asked for, read and checked.

        Raises:
            UserError: a text or task cannot be used.
        """
        check(
            (
                not (spec.tasks and job.runtime.stream),
                "--tasks is given with --stream, and tasks need the whole model in memory.",
                "Leave one of them out.",
            )
        )
        texts = {
            spec_of.rpartition("=")[0] or spec_of: eval_corpus(
                spec_of.rpartition("=")[2], job.tokenizer, seq_len=job.spec.seq_len, windows=spec.windows or None
            )
            for spec_of in spec.text
        }
        tasks = plan_tasks(list(spec.tasks), limit=spec.limit, include_path=spec.include_path) if spec.tasks else None
        if tasks is not None:
            tasks.check_tokens(job.tokenizer)
        return cls(texts=texts, tasks=tasks, speed=spec.speed and not job.runtime.stream)

    @property
    def text(self) -> Corpus | None:
        """The text of the table."""
        return next(iter(self.texts.values()), None)

    @property
    def words(self) -> str | None:
        """What was measured on, for a person."""
        if self.text is None:
            return None
        return f"{self.text.description}, {len(self.text)} windows of {self.text.seq_len} tokens"


def measured(
    job: Job, small: Checkpoint, evaluation: Evaluation, *, unhealed: Recipe | None
) -> tuple[Measures, Measures]:
    """Measures of the job's model and of what was built from it; the former is let go of.

    Speeds are measured in turns where memory holds both models, else one after the other.

    Args:
        unhealed: the recipe before it was healed, whose perplexity is measured too; None where nothing was healed.
    """
    if job.runtime.stream:
        return _streamed(job, small, evaluation, unhealed)
    more = small.nbytes + (0 if job.in_memory else job.checkpoint.nbytes)
    together = more < free_bytes(job.device) * _SHARE_OF_FREE

    def load_small() -> PreTrainedModel:
        return load_model(small, device=job.device, dtype=job.dtype)

    models = {"before": job.resident.model, **({"after": load_small()} if together else {})}
    speeds: dict[str, Speed] = {}
    if evaluation.speed:
        if not together:
            progress.current().say("both models do not fit into memory: their speeds are measured one after the other")
        speeds = compare_speed(models)
    before = _perplexities(models["before"], evaluation)
    dense = _scored(models.pop("before"), job, evaluation, job.model)
    without = None if unhealed is None else _perplexities(Chain(unhealed, job.resident), evaluation)
    job.release()
    after = models.pop("after") if together else load_small()
    if evaluation.speed and not together:
        speeds |= compare_speed({"after": after})
    found = _perplexities(after, evaluation)
    pruned = _scored(after, job, evaluation, small.model)
    if dense is not None and pruned is not None:
        evaluation.accuracy = replace(
            pruned, retention=retention(dense.scores, pruned.scores, against=job.model)
        ).to_dict()
    return (
        _measures(job.checkpoint, before, speeds.get("before"), dense),
        replace(_measures(small, found, speeds.get("after"), pruned), perplexity_without_heal=_first(without)),
    )


def _streamed(
    job: Job, small: Checkpoint, evaluation: Evaluation, unhealed: Recipe | None
) -> tuple[Measures, Measures]:
    """Perplexity alone, layer by layer: how fast a streamed model is says nothing of how fast it is in memory."""
    progress.current().say("the models are streamed: their speeds are not measured")

    def run(recipe: Recipe, resident: LoadedModel) -> dict[str, Perplexity]:
        return _perplexities(Chain(recipe, resident, memory_budget=job.placement.memory_budget()), evaluation)

    before = run(_whole(job.checkpoint), job.resident)
    without = None if unhealed is None else run(unhealed, job.resident)
    job.release()
    after = run(_whole(small), job.placement.resident(small))
    return (
        _measures(job.checkpoint, before),
        replace(_measures(small, after), perplexity_without_heal=_first(without)),
    )


def _whole(checkpoint: Checkpoint) -> Recipe:
    return identity(Variant(name="base", model=checkpoint.model), checkpoint.architecture.n_layers)


def _perplexities(model: nn.Module, evaluation: Evaluation) -> dict[str, Perplexity]:
    return {name: perplexity(model, corpus) for name, corpus in evaluation.texts.items()}


def _scored(model: PreTrainedModel, job: Job, evaluation: Evaluation, name: str) -> TaskResults | None:
    if evaluation.tasks is None:
        return None
    return score_tasks(evaluation.tasks, model, job.tokenizer, name=name)


def _first(found: Mapping[str, Perplexity] | None) -> Perplexity | None:
    return next(iter((found or {}).values()), None)


def _measures(
    checkpoint: Checkpoint,
    found: Mapping[str, Perplexity],
    speed: Speed | None = None,
    scored: TaskResults | None = None,
) -> Measures:
    return Measures(
        layers=checkpoint.architecture.n_layers,
        parameters=checkpoint.parameters,
        bytes=checkpoint.nbytes,
        perplexity=_first(found),
        other_perplexities=dict(list(found.items())[1:]),
        accuracy=None if scored is None else scored.mean,
        prefill_per_s=None if speed is None else speed.prefill_tokens_per_s,
        decode_per_s=None if speed is None else speed.decode_tokens_per_s,
    )
