"""`intarsia heal`: fit and train a pruned model toward the original, stage by stage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from intarsia.commands.push import push_later
from intarsia.disk import require_room
from intarsia.errors import check
from intarsia.flags import Flag, Result, flag
from intarsia.options import JobOutput, PerplexityTexts, Runtime, TextSpec
from intarsia.progress import current
from intarsia.recipe import schema
from intarsia.recipe.algebra import reference_layers
from intarsia.recipe.recipe import LayerRef, Op, Recipe, Select, Variant
from intarsia.registry import heal_stages
from intarsia.run_dir import RunDir

if TYPE_CHECKING:
    from intarsia.building.loaded_model import LoadedModel
    from intarsia.checkpoint.reader import Checkpoint
    from intarsia.data.corpus import Corpus

BLEND, _UNPRUNED = "the same blend with no layer removed", "unpruned"
"""The teacher of a recipe over several models, and its folder in the run folder."""
_HELD_OUT, _MOST_HELD_OUT = 16, 16_384
"""Hold out one sequence in 16, up to 16,384 tokens, so that measuring stays cheaper than training."""

Stages: TypeAlias = Annotated[Any, heal_stages.by("stages")]
"""Heal stages: their names or settings, in order."""


@dataclass(frozen=True, kw_only=True)
class TrainingText(TextSpec):
    """Text: for fitting and training; a small part of it is held out."""

    # Training text, as --calibration of `plan`.
    sources: tuple[str, ...] = flag(MISSING, "--data", metavar="SPEC")


@dataclass(frozen=True, kw_only=True)
class HealedModel(JobOutput):
    """Output: of the healed model."""

    suffix = ".heal"


@dataclass(frozen=True, kw_only=True)
class HealResult(Result):
    """The result of healing."""

    source: Path
    out: Path
    run: Path
    teacher: str
    # A row for the given model, and one for each stage: perplexities (held-out text first), the mean relative error of
    # hidden states, tokens, seconds, and whether the stage was accepted.
    stages: tuple[dict[str, Any], ...]
    # For each output layer its span, and the error of its hidden state before and after.
    layers: tuple[dict[str, Any], ...]
    # The stages' own reports.
    details: dict[str, list[dict[str, Any]]]
    recipe_sha256: str
    # A row for the original, the given and the healed model: perplexity of the held-out text, agreement with the
    # original's answers, and quality of its own answers; empty if these were not measured.
    answers: tuple[dict[str, Any], ...] = ()
    # A warning, if perplexity is good and the answers are not.
    warning: str | None = None
    report: Path | None = None
    seconds: float
    peak_memory_bytes: int
    # The upload to the hub.
    push: Mapping[str, Any] | None = None

    def summary(self) -> dict[str, Any]:
        """Without the numbers of single layers."""
        shown = ("stages", "answers", "warning", "teacher", "seconds", "out", "run", "report", "push")
        data = self.to_dict()
        return {name: data[name] for name in shown if name in data}


def heal(
    source: Annotated[
        Path,
        Flag(
            positional=True,
            metavar="MODEL|RECIPE",
            help="A model that intarsia built, a recipe (.yaml), or a run folder of `plan` (its smallest depth).",
        ),
    ],
    out: HealedModel | str | Path,
    text: TrainingText | str | Path,
    *,
    stages: Stages = "closed-form",
    teacher: Annotated[
        str | None,
        Flag(
            metavar="MODEL",
            help="The teacher of training stages (default: the recipe's base, or for several models their blend with "
            "no layer removed). The closed form always uses the default.",
        ),
    ] = None,
    evaluation: PerplexityTexts = PerplexityTexts(),
    runtime: Runtime = Runtime(),
) -> HealResult:
    """Heal a pruned model: in closed form, layer by layer, or as a whole.

    If it is interrupted, the same command resumes. Under `accelerate launch -m intarsia heal ...` the end-to-end stage
    uses all processes.

    Raises:
        UserError: the input cannot be used.
    """
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.commands.build import build_recipe, read_recipe
    from intarsia.commands.job import keep_written
    from intarsia.commands.measures import measured_stages, report_model
    from intarsia.commands.report import REPORT
    from intarsia.disk import check_no_input, check_out
    from intarsia.evaluation.agreement import Asked
    from intarsia.evaluation.perplexity import eval_corpora
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.healing import training
    from intarsia.healing.pipeline import HealContext, check_stages, check_turns, pinned, run_stages

    started, source, out = time.perf_counter(), Path(source), HealedModel.of(out)
    text = text if isinstance(text, TrainingText) else TrainingText(sources=(str(text),))
    main, run = training.rank() == 0, RunDir(out.run_path)

    # Input: find every problem before any work.
    chosen = heal_stages.choose_all(stages)
    check((bool(chosen), "--stages names no heal stage.", f"Name some of {', '.join(heal_stages.names)}."))
    check_stages(chosen, runtime)
    send_off = push_later(out.push_to, private=out.private)
    recipe = read_recipe(source)
    inputs = inputs_of(
        models=[] if teacher is None else [teacher],
        recipe=recipe,
        texts=[*text.sources, *evaluation.sources.values(), *filter(None, [evaluation.prompts])],
        files=[source, source.with_suffix(".safetensors")],  # a recipe has a side file
    )
    if main:
        check_out(out.path, overwrite=out.overwrite, inputs=inputs)
        check_no_input(run.path, inputs)
    subject = Subject(recipe, run.path, teacher, text, runtime)
    reported = tuple(eval_corpora(evaluation, subject.tokenizer, seq_len=text.seq_len).values())
    check_turns(chosen, subject.tokenizer)
    asked = Asked.of(evaluation, subject.tokenizer, subject.base.architecture.config, stream=runtime.stream)
    settings = {
        **subject.facts(),
        **{name: getattr(text, name) for name in ("tokens", "seq_len", "seed")},
        "data": list(text.sources),
        "eval_text": list(evaluation.text),
        "eval_windows": list(evaluation.windows),
        "processes": training.world_size(),
        "stages": [each.name for each in chosen],
        **{each.name: {key: value for key, value in pinned(each).items() if key != "name"} for each in chosen},
    }

    # The run folder. Of several processes, the first one writes what the others read there and in caches.
    wait = training.barrier(subject.placement.device)
    with ExitStack() as opened:
        if main:
            run.check(settings)
            if not text.writes:
                _ = subject.text_parts  # too little text must not leave a run folder
            opened.enter_context(run.opened(settings))
            corpora = dict(zip(("train", "held_out"), subject.text_parts, strict=True))
            facts: dict[str, Any] = {n: {"sha256": c.sha256, "tokens": c.tokens} for n, c in corpora.items()}
            run.pin("text", facts | {"evaluation": {corpus.description: corpus.sha256 for corpus in reported}})
            keep_written(run, subject.written, subject.tokenizer)
            _ = subject.over_its_teacher
        wait()

        # Heal.
        recipe, variants = subject.over_its_teacher
        train, held_out = subject.text_parts
        context = HealContext(
            run=run,
            variants=variants,
            load=lambda: subject.resident,
            device=subject.placement.device,
            calibration=train,
            selection=held_out,
            evaluation=reported,
            layer_errors=True,
            teacher=subject.teacher,
            load_teacher=subject.load_teacher,
            tokenizer=subject.tokenizer,
            memory_bytes=runtime.memory_bytes,
            batch_tokens=runtime.batch_tokens,
        )
        healed = run_stages(context, recipe, chosen)
        measured: dict[str, Any] = {}
        if main and asked is not None:
            measured = measured_stages(context, healed, asked, seed=text.seed, key=subject.sha256)

        # Build, over the models of the given recipe.
        account = healed.recipe.provenance["heal"] | {
            "settings": {k: v for k, v in settings.items() if "config" not in k}
        }
        given = subject.recipe
        final = replace(given, fitted=healed.recipe.fitted, provenance={**given.provenance, "heal": account})
        if main:
            built = build_recipe(final, out.path, overwrite=out.overwrite, max_shard_bytes=out.shard_bytes)
            report_model(final, subject.base, built, measured, held_out)
            forget_blend(run.path)
        wait()
    first, last = healed.stages[0].quality["errors"], healed.stages[-1].quality["errors"]
    result = HealResult(
        source=source,
        out=out.path,
        run=run.path,
        teacher=subject.teacher_name,
        stages=tuple(result.row() for result in healed.stages),
        layers=tuple(
            {"layer": index, "span": f"{start}-{stop - 1}", "error_before": before, "error_after": after}
            for index, ((start, stop), before, after) in enumerate(zip(given.spans, first, last, strict=True))
        ),
        details={result.stage: result.details for result in healed.stages[1:]},
        recipe_sha256=schema.content_hash(final),
        answers=tuple(measured.get("models", ())),
        warning=measured.get("warning"),
        report=out.path / REPORT if main else None,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )
    return send_off(result, out.path) if main else result


class Subject:
    """The inputs of healing: a recipe over opened checkpoints, its teacher, and the text.

    Attributes:
        recipe: the given recipe; `variants` are the checkpoints of its models.
        teacher: a teacher other than the recipe's base or blend.
        placement: of models, on the device of this process.
        written: the text that the model wrote itself, once it was drawn.
    """

    def __init__(self, recipe: Recipe, run: Path, teacher: str | None, text: TextSpec, runtime: Runtime) -> None:
        """Open all checkpoints.

        Raises:
            UserError: one cannot be opened, the teacher does not fit, or a streamed model is to write text.
        """
        from intarsia.activations.architecture_checks import verified
        from intarsia.checkpoint.resolve import open_checkpoint
        from intarsia.commands.build import open_variants
        from intarsia.commands.job import Placement, check_seq_len, check_streamed_text, load_tokenizer
        from intarsia.healing import training
        from intarsia.healing.teacher import check_teacher

        self.recipe, self.text, self._run = recipe, text, run
        self.written: Corpus | None = None
        placed = Placement.of(runtime)
        self.placement = replace(placed, devices=(training.own_device(placed.device), *placed.devices[1:]))
        self.variants = {name: verified(each) for name, each in open_variants(recipe).items()}
        self.base, self._blended = self.variants[recipe.base], len(self.variants) > 1
        self.teacher = None if teacher is None else open_checkpoint(teacher)
        if self.teacher is not None:
            check_teacher(recipe, self.base.architecture, self.teacher.architecture, name=str(teacher))
        check_seq_len(self.base, text.seq_len)
        self.tokenizer = load_tokenizer(self.base)
        check_streamed_text(text, runtime, option="--data")

    @property
    def teacher_name(self) -> str:
        """The teacher's name for log and report."""
        return BLEND if self._blended and self.teacher is None else (self.teacher or self.base).model

    @cached_property
    def _members(self) -> dict[str, str]:
        """The hash of the weights of each variant."""
        from intarsia.checkpoint.hashing import scan

        return {name: scan(checkpoint) for name, checkpoint in self.variants.items()}

    @cached_property
    def sha256(self) -> str:
        """The identity of the default teacher."""
        return blend_sha256(self.recipe, self._members) if self._blended else self._members[self.recipe.base]

    def facts(self) -> dict[str, Any]:
        """The pinned facts."""
        from intarsia.checkpoint.hashing import acting_config, scan

        return {
            "recipe": schema.content_hash(self.recipe),
            "config": acting_config(self.base.config),
            "teacher": self.sha256 if self.teacher is None else scan(self.teacher),
            "teacher_config": acting_config((self.teacher or self.base).config),
            **({"members": self._members} if self._blended else {}),
        }

    @cached_property
    def over_its_teacher(self) -> tuple[Recipe, Mapping[str, Checkpoint]]:
        """The recipe over its default teacher; for several models that is their blend, in the run folder."""
        if not self._blended:
            return self.recipe, self.variants
        return over_its_blend(self.recipe, self.variants, self._run)

    @cached_property
    def resident(self) -> LoadedModel:
        """The default teacher in memory, with all its variants."""
        recipe, variants = self.over_its_teacher
        others = {name: checkpoint for name, checkpoint in variants.items() if name != recipe.base}
        return self.placement.resident(variants[recipe.base], others)

    @property
    def load_teacher(self) -> Callable[[], LoadedModel] | None:
        """The loader of the other teacher; None without one."""
        teacher = self.teacher
        return None if teacher is None else lambda: self.placement.resident(teacher)

    @cached_property
    def text_parts(self) -> tuple[Corpus, Corpus]:
        """The text for fitting and training, and the selection text, which the recipe was not fitted on before.

        Raises:
            UserError: there is too little text.
        """
        corpus, seq_len = self._draw(self.text.length), self.text.seq_len
        number = max(1, min(round(len(corpus) / _HELD_OUT), _MOST_HELD_OUT // seq_len))
        train, held_out = corpus.split(1.0 - number / len(corpus) if len(corpus) > 1 else 0.5)
        # Tokens at the start of this same text on which the recipe was fitted before.
        said = self.recipe.provenance.get("calibration") or {}
        same = {"text": corpus.description, "seq_len": seq_len, "seed": self.text.seed}
        fits = bool(self.recipe.fitted) and all(said.get(name) == value for name, value in same.items())
        seen = int(said.get("tokens", 0)) if fits else 0
        if seen > train.tokens:
            current().say(f"{seen} tokens of this text were used for fitting before; later ones are held out")
            # A longer draw has the same sequences first.
            longer = self._draw(seen + len(held_out) * seq_len)
            held_out = longer.split(1.0 - len(held_out) / len(longer))[1]
        return train, replace(held_out, description="held-out text")

    def _draw(self, tokens: int) -> Corpus:
        from intarsia.data.text import draw

        text = replace(self.text, tokens=tokens)
        parts = draw(text, self.tokenizer, writer=lambda: self.resident.model, writer_key=self.sha256)
        corpus, self.written = parts.calibration, self.written or parts.written
        return corpus


def blend_of(recipe: Recipe) -> Recipe:
    """The recipe with no layer removed."""
    return recipe.with_layers(reference_layers(recipe), provenance={})


def blend_sha256(recipe: Recipe, members: Mapping[str, str]) -> str:
    """The blend's identity, known before it is built; `members` are the weight hashes of all variants."""
    plain = replace(recipe, variants=tuple(Variant(name=v.name, model=v.name) for v in recipe.variants))
    facts = [schema.content_hash(blend_of(plain)), sorted(members.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def over_its_blend(
    recipe: Recipe, variants: Mapping[str, Checkpoint], run: Path
) -> tuple[Recipe, dict[str, Checkpoint]]:
    """The same model as a recipe over its blend, and all checkpoints of that.

    Healed toward one of its members, a blend would lose what it has from the others. So the same blend with all of its
    layers takes the base's place: unpruned layers become plain selections from it, and the stages work as with one
    model. The tensors they fit then belong to the recipe over the members.

    Args:
        variants: the opened members.
        run: a run folder with this recipe and these members; the blend is written to `unpruned/` there, unless an
            earlier call did so.

    Raises:
        UserError: it cannot be written.
    """
    from intarsia.building.materialize import materialize
    from intarsia.checkpoint.hashing import scan
    from intarsia.checkpoint.reader import Checkpoint

    blended = blend_of(recipe)
    folder, layers = run / _UNPRUNED, blended.layers
    if not folder.exists():
        require_room(run, variants[recipe.base].nbytes, f"the teacher, {BLEND}", option="--run")
        current().say(f"made of several models; the teacher is {BLEND}")
        materialize(blended, variants, folder)
    blend = Checkpoint.open(folder, model=str(folder))
    name = _UNPRUNED
    while name in variants:
        name += "_"

    def over(op: Op) -> Op:
        at = op.sources[0].layer
        return Select(source=LayerRef(variant=name, layer=at)) if op == layers[at] else op

    made = replace(
        recipe,
        variants=(Variant(name=name, model=str(folder), sha256=scan(blend)), *recipe.variants),
        base=name,
        layers=tuple(over(op) for op in recipe.layers),
    )
    return made, {name: blend, **variants}


def forget_blend(run: Path) -> None:
    """Delete the blend once it is no longer needed. A kill leaves an incomplete one, which does not count."""
    folder, leaving = run / _UNPRUNED, run / f".{_UNPRUNED}"
    if folder.exists():
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)
