"""The measures of `compress` and `heal` on the original and the new model: perplexity, answers, tasks, speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from intarsia import progress
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.building.loaded_model import load_model
from intarsia.building.offload import free_bytes
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.build import BuildResult, card_facts
from intarsia.commands.job import Job
from intarsia.commands.report import REPORT
from intarsia.data.corpus import Corpus
from intarsia.disk import write_whole
from intarsia.errors import UserError
from intarsia.evaluation.agreement import Asked, doubt
from intarsia.evaluation.perplexity import Chain, eval_corpora, model_of, perplexity
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
_OTHERS = 20_000  # tokens that are read in the time that speed and answers take, about
_WRITTEN = 16  # tokens generated after a prompt to measure speed


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The measures that are compared before and after."""

    layers: int
    parameters: int
    # Size of the weights.
    bytes: int
    perplexity: Perplexity | None
    # Of the pruned model before healing.
    perplexity_without_heal: Perplexity | None = None
    # On further evaluation texts, by name.
    other_perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    # Agreement of next tokens with the original's, and measures of answers.
    answers: Agreement | None = None
    # Mean accuracy over the tasks.
    accuracy: float | None = None
    # Tokens per second; None if they are not measured.
    prefill_per_s: float | None
    decode_per_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data for a row of a table: measures with errors are mappings."""
        perplexities = {"perplexity": self.perplexity, "perplexity_without_heal": self.perplexity_without_heal}
        perplexities |= {f"perplexity of {name}": found for name, found in self.other_perplexities.items()}
        return {
            **{name: getattr(self, name) for name in ("layers", "parameters", "bytes")},
            **{name: None if found is None else found.measure for name, found in perplexities.items()},
            **({} if self.answers is None else self.answers.measures()),
            **{name: getattr(self, name) for name in ("accuracy", "prefill_per_s", "decode_per_s")},
        }


@dataclass(kw_only=True)
class Evaluation:
    """The evaluation before and after, and its results."""

    # Texts for perplexity by name; the table shows the first one.
    texts: dict[str, Corpus]
    tasks: TaskPlan | None
    speed: bool
    # Prompts for both models.
    asked: Asked | None
    # Accuracy of the new model on the tasks, with its retention of the original's.
    accuracy: dict[str, Any] | None = field(default=None, init=False)

    @classmethod
    def of(cls, job: Job, spec: EvalSpec) -> Evaluation:
        """The texts and tasks of `--eval-text` and `--tasks`, read and checked.

        Raises:
            UserError: a text or task cannot be used.
        """
        if spec.tasks and job.runtime.stream:
            raise UserError(
                "--tasks is given with --stream, but tasks need the whole model in memory.", "Leave one of them out."
            )
        return cls(
            texts=eval_corpora(spec, job.tokenizer, seq_len=job.spec.seq_len),
            tasks=TaskPlan.of(spec, job.tokenizer),
            speed=spec.speed and not job.runtime.stream,
            asked=Asked.of(spec, job.tokenizer, job.checkpoint.architecture.config, stream=job.runtime.stream),
        )

    @property
    def text(self) -> Corpus | None:
        """The text whose perplexity is in the table."""
        return next(iter(self.texts.values()), None)

    @property
    def words(self) -> str | None:
        """The evaluation text in words."""
        if self.text is None:
            return None
        return f"{self.text.description}, {len(self.text)} windows of {self.text.seq_len} tokens"

    def passes(self, tokens: int) -> float:
        """Passes over a calibration text of `tokens` tokens that the evaluation takes, without tasks, roughly."""
        read = sum(corpus.tokens for corpus in self.texts.values()) or tokens / 8
        return (_OTHERS + 3 * read) / tokens

    def perplexities(self, model: nn.Module) -> dict[str, Perplexity]:
        """The perplexity on every text."""
        with progress.current().task("", 1, units=1):
            return {name: perplexity(model, corpus) for name, corpus in self.texts.items()}

    def scores(self, model: nn.Module, job: Job, name: str) -> TaskResults | None:
        """The scores on the tasks; None if there are none."""
        return None if self.tasks is None else score_tasks(self.tasks, model, job.tokenizer, name=name)


def measured(
    job: Job, small: Checkpoint, evaluation: Evaluation, *, unhealed: Recipe | None
) -> tuple[Measures, Measures]:
    """Measure the job's model and the built one; the former is freed.

    Speeds are measured in turns if memory holds both models, else one after the other. Those of a streamed model are
    not measured, because they differ from those in memory.

    Args:
        unhealed: the recipe before healing, whose perplexity is also measured; None without healing.
    """
    streams, report = job.runtime.stream, progress.current()
    memory_budget = job.placement.memory_budget() if streams else None

    def load_small() -> nn.Module:
        if streams:
            return model_of(None, job.placement.resident(small), memory_budget=memory_budget)
        return load_model(small, device=job.device, dtype=job.dtype)

    if streams:
        report.say("the models are streamed, so speed is not measured")
    more = small.nbytes + (0 if job.in_memory else job.checkpoint.nbytes)
    together = not streams and more < free_bytes(job.device) * _SHARE_OF_FREE
    models = {"before": model_of(None, job.resident, memory_budget=memory_budget)}
    models |= {"after": load_small()} if together else {}
    speeds: dict[str, Speed] = {}
    if evaluation.speed:
        if not together:
            report.say("the models do not fit into memory together, so their speeds are measured one after the other")
        with report.task("", 1, units=1):
            speeds = compare_speed(models, new_tokens=_WRITTEN)
    before = evaluation.perplexities(models["before"])
    reference, answers = None, None
    if evaluation.asked is not None:
        with report.task("", 1, units=1):
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
        checkpoint: Checkpoint,
        found: Mapping[str, Perplexity],
        speed: Speed | None,
        scored: TaskResults | None,
        **more: Any,
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
            **more,
        )

    itself = None if reference is None else reference.itself()
    bare = next(iter(without.values()), None)
    return (
        measures(job.checkpoint, before, speeds.get("before"), dense, answers=itself),
        measures(small, after, speeds.get("after"), pruned, answers=answers, perplexity_without_heal=bare),
    )


def measured_stages(context: HealContext, healed: Healed, asked: Asked, *, seed: int, key: str) -> dict[str, Any]:
    """Measures of the original, of the given model and, if a stage was accepted, of the healed one.

    Args:
        key: the hash of the original's weights.

    Returns:
        In the form of `report_model`, with `models`: a row for each.
    """
    budget = MemoryBudget(context.memory_bytes)
    original = model_of(None, context.resident, memory_budget=budget)
    reference = asked.answered(original, seed=seed, key=key)
    answers = reference.itself()
    rows = {"original": {"perplexity": perplexity(original, context.held_out).measure, **answers.measures()}}
    stages = {"as it came": healed.stages[0], **({"healed": healed.stages[-1]} if healed.taken else {})}
    for name, stage in stages.items():
        model = model_of(stage.recipe, context.resident, memory_budget=budget)
        answers = reference.score(reference.follow(model), original)
        found = {key: stage.quality["texts"][0][key] for key in ("value", "stderr")}
        rows[name] = {"perplexity": found, **answers.measures()}
    before, *_, after = rows.values()
    models = [{"model": name, **row} for name, row in rows.items()]
    return {
        "before": before,
        "after": after,
        "warning": doubt(before, after),
        "answers": asdict(answers),
        "models": models,
    }


def report_model(
    recipe: Recipe, base: Checkpoint, built: BuildResult, measured: Mapping[str, Any], text: Corpus | None
) -> None:
    """Write measures into the card and the folder of a built model, and its report.

    Args:
        measured: `before`, `after`, `warning`, and other keys of `keep_measures`; empty without measures.
        text: the evaluation text.
    """
    if measured:
        facts = card_facts(recipe, base, built, title=built.out.name)
        evaluation: dict[str, Any] | None = None
        if text is not None:
            facts["evaluation"] = f"{text.description}, {len(text)} windows of {text.seq_len} tokens"
            evaluation = {"text": text.description, "sha256": text.sha256}
            evaluation |= {"windows": len(text), "seq_len": text.seq_len}
        before, after = ({**facts[name], **measured[name]} for name in ("before", "after"))
        facts |= {"before": before, "after": after, "warning": measured["warning"]}
        write_whole(built.out / "README.md", model_card(facts))
        kept = {"model": facts["model"], **measured, "before": before, "after": after, "evaluation": evaluation}
        keep_measures(built.out, kept)
    write_report([built.out], built.out / REPORT)
