"""What `compress` and `heal` measure of the original and of the new model: perplexity, answers, tasks, speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn

from intarsia import progress
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.building.loaded_model import load_model
from intarsia.building.offload import free_bytes
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.build import BuildResult
from intarsia.commands.job import Job
from intarsia.commands.recipes import card_facts
from intarsia.commands.report import REPORT
from intarsia.data.corpus import Corpus
from intarsia.disk import write_whole
from intarsia.errors import check
from intarsia.evaluation.agreement import Asked, doubt
from intarsia.evaluation.perplexity import Chain, eval_corpus, model_of, perplexity
from intarsia.evaluation.results import Agreement, Perplexity, Speed, TaskResults, with_retention
from intarsia.evaluation.speed import compare_speed
from intarsia.evaluation.tasks import TaskPlan, score_tasks
from intarsia.healing.pipeline import HealContext, Healed
from intarsia.options import EvalSpec
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.card import model_card
from intarsia.reporting.model_report import keep_measures
from intarsia.reporting.page import write_report

_SHARE_OF_FREE = 0.8
_WRITTEN = 16  # tokens, after a prompt, that speed is measured on

Rows: TypeAlias = dict[str, dict[str, Any]]
"""Perplexity and answers by model: `original`, `as it came`, and `healed` where a stage was accepted."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is compared before and after."""

    layers: int
    parameters: int
    # Of the weights.
    bytes: int
    perplexity: Perplexity | None
    # Of the pruned model before it was healed.
    perplexity_without_heal: Perplexity | None = None
    # On further evaluation texts, by name.
    other_perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    # Of next tokens with the original's, and of answers.
    answers: Agreement | None = None
    # Mean over the tasks.
    accuracy: float | None = None
    # Tokens a second; None where they are not measured.
    prefill_per_s: float | None
    decode_per_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""

        def plain(found: Perplexity | None) -> dict[str, Any] | None:
            # One window has no scatter.
            return (
                None if found is None else {"value": found.value, "stderr": found.stderr if found.windows > 1 else None}
            )

        data: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "answers":
                data |= {} if value is None else value.measures()
            elif name != "other_perplexities":
                data[name] = plain(value) if name.startswith("perplexity") else value
        return data | {f"perplexity of {name}": plain(found) for name, found in self.other_perplexities.items()}


@dataclass(kw_only=True)
class Evaluation:
    """What is measured before and after, and what came of it."""

    # Texts for perplexity, by name; the first one is the one in the table.
    texts: dict[str, Corpus]
    tasks: TaskPlan | None
    speed: bool
    # Prompts that both models answer.
    asked: Asked | None
    # Accuracy of the new model on the tasks, and what it kept of the original's.
    accuracy: dict[str, Any] | None = field(default=None, init=False)

    @classmethod
    def of(cls, job: Job, spec: EvalSpec) -> Evaluation:
        """The texts and tasks of `--eval-text` and `--tasks`, read and checked.

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
        tasks = TaskPlan.of(spec, job.tokenizer)
        asked = Asked.of(spec, job.tokenizer, job.checkpoint.architecture.config, stream=job.runtime.stream)
        return cls(texts=texts, tasks=tasks, speed=spec.speed and not job.runtime.stream, asked=asked)

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

    def perplexities(self, model: nn.Module) -> dict[str, Perplexity]:
        """On every text."""
        return {name: perplexity(model, corpus) for name, corpus in self.texts.items()}

    def scores(self, model: nn.Module, job: Job, name: str) -> TaskResults | None:
        """On the tasks; None where there are none."""
        return None if self.tasks is None else score_tasks(self.tasks, model, job.tokenizer, name=name)


def measured(
    job: Job, small: Checkpoint, evaluation: Evaluation, *, unhealed: Recipe | None
) -> tuple[Measures, Measures]:
    """Measures of the job's model and of what was built from it; the former is freed.

    Speeds are measured in turns where memory holds both models, else one after the other. Those of a streamed model are
    not measured: they say nothing of how fast it is in memory.

    Args:
        unhealed: the recipe before it was healed, whose perplexity is measured too; None where nothing was healed.
    """

    streams, report = job.runtime.stream, progress.current()
    memory_budget = job.placement.memory_budget() if streams else None

    def load_small() -> nn.Module:
        if streams:
            return model_of(None, job.placement.resident(small), memory_budget=memory_budget)
        return load_model(small, device=job.device, dtype=job.dtype)

    if streams:
        report.say("the models are streamed: speed is not measured")
    more = small.nbytes + (0 if job.in_memory else job.checkpoint.nbytes)
    together = not streams and more < free_bytes(job.device) * _SHARE_OF_FREE
    models = {"before": model_of(None, job.resident, memory_budget=memory_budget)}
    models |= {"after": load_small()} if together else {}
    speeds: dict[str, Speed] = {}
    if evaluation.speed:
        if not together:
            report.say("both models do not fit into memory: their speeds are measured one after the other")
        speeds = compare_speed(models, new_tokens=_WRITTEN)
    before = evaluation.perplexities(models["before"])
    reference, answers = None, None
    if evaluation.asked is not None:
        reference = evaluation.asked.answered(models["before"], seed=job.spec.seed, key=job.sha256)
        answers = reference.score(reference.follow(models["after"]), models["before"]) if together else None
    dense = evaluation.scores(models.pop("before"), job, job.model)
    without = {}
    if unhealed is not None:
        without = evaluation.perplexities(Chain(unhealed, job.resident, memory_budget=memory_budget))
    job.release()
    model = models.pop("after") if together else load_small()
    if evaluation.speed and not together:
        speeds |= compare_speed({"after": model}, new_tokens=_WRITTEN)
    after = evaluation.perplexities(model)
    pruned = evaluation.scores(model, job, small.model)
    if reference is not None and answers is None:
        followed = reference.follow(model)
        del model
        answers = reference.score(followed, None if followed.answers is None else job.resident.model)
        job.release()
    if dense is not None and pruned is not None:
        evaluation.accuracy = with_retention(dense, pruned).to_dict()

    def measures(
        checkpoint: Checkpoint, found: Mapping[str, Perplexity], speed: Speed | None, scored: TaskResults | None
    ) -> Measures:
        return Measures(
            layers=checkpoint.architecture.n_layers,
            parameters=checkpoint.parameters,
            bytes=checkpoint.nbytes,
            perplexity=next(iter(found.values()), None),
            other_perplexities=dict(list(found.items())[1:]),
            accuracy=None if scored is None else scored.mean,
            prefill_per_s=None if speed is None else speed.prefill_tokens_per_s,
            decode_per_s=None if speed is None else speed.decode_tokens_per_s,
        )

    whole = measures(job.checkpoint, before, speeds.get("before"), dense)
    healed = measures(small, after, speeds.get("after"), pruned)
    return (
        replace(whole, answers=None if reference is None else reference.itself()),
        replace(healed, perplexity_without_heal=next(iter(without.values()), None), answers=answers),
    )


def measured_stages(
    context: HealContext, healed: Healed, asked: Asked, *, seed: int, key: str
) -> tuple[Rows, Agreement]:
    """Measures of the original, of the model as it came and, where a stage was accepted, as it is healed.

    Args:
        key: the hash of the original's weights.

    Returns:
        Perplexity and answers by model, and all of the answers of the last one.
    """
    budget = MemoryBudget(context.memory_bytes)
    original = model_of(None, context.resident, memory_budget=budget)
    reference = asked.answered(original, seed=seed, key=key)
    answers = reference.itself()
    rows: Rows = {"original": _row(asdict(perplexity(original, context.held_out)), answers)}
    stages = {"as it came": healed.stages[0], **({"healed": healed.stages[-1]} if healed.taken else {})}
    for name, stage in stages.items():
        model = model_of(stage.recipe, context.resident, memory_budget=budget)
        answers = reference.score(reference.follow(model), original)
        rows[name] = _row(stage.quality["texts"][0], answers)
    return rows, answers


def _row(perplexity: Mapping[str, Any], answers: Agreement) -> dict[str, Any]:
    return {"perplexity": {name: perplexity[name] for name in ("value", "stderr")}, **answers.measures()}


def report_stages(
    built: BuildResult, recipe: Recipe, base: Checkpoint, measured: tuple[Rows, Agreement] | None, text: Corpus
) -> None:
    """Write the report of a healed model, and what was measured into its card.

    Args:
        measured: as `measured_stages` gives it; None where nothing was measured.
        text: what perplexity was measured on.
    """
    if measured is not None:
        rows, answers = measured
        first, *_, last = rows.values()
        facts = card_facts(recipe, base, built, title=built.out.name)
        facts |= {"before": {**facts["before"], **first}, "after": {**facts["after"], **last}}
        facts |= {"warning": doubt(first, last), "evaluation": text.description}
        write_whole(built.out / "README.md", model_card(facts))
        evaluation = {"text": text.description, "sha256": text.sha256, "windows": len(text), "seq_len": text.seq_len}
        kept = {name: facts[name] for name in ("model", "before", "after", "warning")}
        kept |= {"answers": asdict(answers), "models": table_of(rows), "evaluation": evaluation}
        keep_measures(built.out, kept)
    write_report([built.out], built.out / REPORT)


def table_of(rows: Rows) -> tuple[dict[str, Any], ...]:
    """A row a model."""
    return tuple({"model": name, **row} for name, row in rows.items())
