"""`intarsia heal`: fit and train a pruned model toward the original, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch

from intarsia import progress
from intarsia.building.loaded_model import Resident
from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.hashing import acting_config, scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.checkpoint.staging import check_out
from intarsia.commands.job import Placement, check_seq_len, load_tokenizer
from intarsia.data.corpus import Corpus
from intarsia.data.text import TextParts, draw
from intarsia.errors import UserError, check
from intarsia.evaluation.perplexity import eval_corpus
from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.flags import Flag, flag, plain
from intarsia.healing import launch
from intarsia.healing.blend import BLEND, back, blend_sha256, forget, over_its_blend
from intarsia.healing.layer_map import check_teacher
from intarsia.healing.pipeline import HealContext, Healed, check_stages, pinned, run_stages
from intarsia.options import NewModel, Runtime, TextSpec
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.registry import heal_stages
from intarsia.run_dir import RunDir
from intarsia.stages.build import build_recipe, open_variants, read_recipe
from intarsia.stages.push import push_later

_HELD_OUT, _MOST_HELD_OUT = 16, 16_384
"""One in so many sequences is held out, and no more tokens than that: measuring must not take longer than training."""

Stages: TypeAlias = Annotated[Any, heal_stages.by("stages")]
"""Heal stages: their names or settings, in order."""


@dataclass(frozen=True, kw_only=True)
class TrainingText(TextSpec):
    """Text: what is fitted and trained on; a small part of it is held out."""

    # Training text, as --calibration of `plan`.
    sources: tuple[str, ...] = flag(MISSING, "--data", metavar="SPEC")


@dataclass(frozen=True, kw_only=True)
class PerplexityTexts:
    """Evaluation: texts whose perplexity is reported after every stage."""

    # Text whose perplexity is reported after every stage.
    text: tuple[str, ...] = flag((), "--eval-text", metavar="FILE")
    # Sequences of each to use.
    windows: int = flag(64, "--eval-windows", metavar="N")


@dataclass(frozen=True, kw_only=True)
class HealedModel(NewModel):
    """Output: where the healed model goes."""

    # Run folder: state and log (default: beside the output).
    run: Path | None = flag(None, metavar="DIR")

    @property
    def run_path(self) -> Path:
        """The run folder: as given, or beside the output."""
        return self.path.with_name(f"{self.path.name}.heal") if self.run is None else Path(self.run)


@dataclass(frozen=True, kw_only=True)
class HealResult:
    """What healing gave."""

    source: Path
    out: Path
    run: Path
    teacher: str
    # A row for the model as it came, and one for each stage: perplexities (held-out text first), the mean relative
    # error of hidden states, tokens, seconds, and whether the stage was accepted.
    stages: tuple[dict[str, Any], ...]
    # For each output layer its span, and the error of its hidden state before and after.
    layers: tuple[dict[str, Any], ...]
    # What the stages themselves report.
    details: dict[str, list[dict[str, Any]]]
    recipe_sha256: str
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "source": str(self.source), "out": str(self.out), "run": str(self.run)}


def heal(
    source: Annotated[
        Path,
        Flag(
            positional=True,
            metavar="MODEL|RECIPE",
            help="A folder that intarsia has built, a recipe (.yaml), or a run folder of `plan` (its least depth).",
        ),
    ],
    out: HealedModel | str | Path,
    text: TrainingText,
    *,
    stages: Stages = "closed-form",
    teacher: Annotated[
        str | None,
        Flag(
            metavar="MODEL",
            help="What stages that train learn from (default: the recipe's base; of several models, their blend with "
            "no layer removed). The closed form always learns from that default.",
        ),
    ] = None,
    evaluation: PerplexityTexts = PerplexityTexts(),
    runtime: Runtime = Runtime(),
) -> HealResult:
    """Heal a pruned model: in closed form, layer by layer, or as a whole.

    Stopped at any point, the same command resumes. Under `accelerate launch -m intarsia heal ...` the end-to-end stage
    uses all processes.

    Raises:
        UserError: something about the input cannot be used.
    """
    started, source, out = time.perf_counter(), Path(source), HealedModel.of(out)
    main, run = launch.rank() == 0, RunDir(out.run_path)
    chosen = heal_stages.choose_all(stages)
    check((bool(chosen), "--stages names no heal stage.", f"Name some of {', '.join(heal_stages.names)}."))
    check_stages(chosen, runtime)
    send_off = push_later(out.push_to, private=out.private, progress=progress.current())
    subject = _Subject.opened(read_source(source), run, teacher, runtime)
    if main:
        check_out(out.path, overwrite=out.overwrite, inputs=[source])

    check_seq_len(subject.base, text.seq_len)
    texts = _Texts(subject, text, evaluation)
    settings = {
        **subject.facts(),
        **{name: value for name, value in plain(text).items() if name != "sources"},
        "data": list(text.sources),
        "eval_text": list(evaluation.text),
        "eval_windows": evaluation.windows,
        "processes": launch.world_size(),
        "stages": [each.name for each in chosen],
        **{each.name: {key: value for key, value in pinned(each).items() if key != "name"} for each in chosen},
    }
    wait = launch.barrier(subject.device)
    with ExitStack() as opened:
        if main:
            run.check(settings)
            texts.check()  # a mistake in it must not leave a run folder
            opened.enter_context(run.opened(settings))
            run.pin("text", texts.facts())
            _ = subject.over_its_teacher
        wait()  # the first process has written what the others find in caches
        recipe, variants = subject.over_its_teacher
        context = HealContext(
            run=run,
            variants=variants,
            load=lambda: subject.resident,
            device=subject.device,
            calibration=texts.train,
            selection=texts.held_out,
            evaluation=texts.evaluation,
            layer_errors=True,
            teacher=subject.teacher,
            load_teacher=subject.load_teacher,
            memory_bytes=runtime.memory_bytes,
            batch_tokens=runtime.batch_tokens,
        )
        healed = run_stages(context, recipe, chosen)
        told = healed.recipe.provenance["heal"] | {"settings": {k: v for k, v in settings.items() if "config" not in k}}
        given = subject.recipe
        final = replace(back(given, healed.recipe), provenance={**given.provenance, "heal": told})
        if main:
            build_recipe(
                final,
                out.path,
                overwrite=out.overwrite,
                max_shard_bytes=out.shard_bytes,
                progress=progress.current(),
            )
            forget(run.path)
        wait()
    result = HealResult(
        source=source,
        out=out.path,
        run=run.path,
        teacher=subject.teacher_name,
        stages=tuple(result.row() for result in healed.stages),
        layers=_layers(given, healed),
        details={result.stage: result.details for result in healed.stages[1:]},
        recipe_sha256=schema.content_hash(final),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )
    return send_off(result, out.path) if main else result


def read_source(source: Path) -> Recipe:
    """The recipe of a built model, in a file, or of a run folder.

    Raises:
        UserError: there is none.
    """
    if (source / RECIPE_FILE).is_file():
        return schema.load(source / RECIPE_FILE)
    if source.is_dir() and (source / "config.json").exists():
        raise UserError(
            f"{source} is a model without a recipe.",
            "Heal what `intarsia compress` or `intarsia build` has made, or a recipe file.",
        )
    return read_recipe(source)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is healed: a recipe over opened checkpoints, and what it learns from."""

    recipe: Recipe
    variants: Mapping[str, Checkpoint]
    run: RunDir
    # Another teacher than the recipe's base, or than its blend.
    teacher: Checkpoint | None
    placement: Placement

    @classmethod
    def opened(cls, recipe: Recipe, run: RunDir, teacher: str | None, runtime: Runtime) -> _Subject:
        """Open all checkpoints.

        Raises:
            UserError: one cannot be opened, or the teacher does not fit.
        """
        variants, placed = open_variants(recipe, progress.current()), Placement.of(runtime)
        own = launch.own_device(placed.device)
        found = None if teacher is None else open_checkpoint(teacher, progress=progress.current())
        if found is not None:
            check_teacher(recipe, variants[recipe.base].architecture, found.architecture, name=str(teacher))
        placed = replace(placed, devices=(own, *placed.devices[1:]))
        return cls(recipe=recipe, variants=variants, run=run, teacher=found, placement=placed)

    @property
    def base(self) -> Checkpoint:
        """The recipe's base."""
        return self.variants[self.recipe.base]

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.placement.device

    @property
    def blended(self) -> bool:
        """Whether several models are in it."""
        return len(self.variants) > 1

    @property
    def teacher_name(self) -> str:
        """For a person."""
        return BLEND if self.blended and self.teacher is None else (self.teacher or self.base).model

    @cached_property
    def members(self) -> dict[str, str]:
        """The hash of the weights of each variant."""
        return {name: scan(checkpoint, progress.current()) for name, checkpoint in self.variants.items()}

    @cached_property
    def sha256(self) -> str:
        """Which model it learns from, unless another teacher is given."""
        return blend_sha256(self.recipe, self.members) if self.blended else self.members[self.recipe.base]

    def facts(self) -> dict[str, Any]:
        """What a run folder pins of it."""
        return {
            "recipe": schema.content_hash(self.recipe),
            "config": acting_config(self.base.config),
            "teacher": self.sha256 if self.teacher is None else scan(self.teacher, progress.current()),
            "teacher_config": acting_config((self.teacher or self.base).config),
            **({"members": self.members} if self.blended else {}),
        }

    @cached_property
    def over_its_teacher(self) -> tuple[Recipe, Mapping[str, Checkpoint]]:
        """The recipe over what it learns from; for several models that is their blend, in the run folder."""
        if not self.blended:
            return self.recipe, self.variants
        return over_its_blend(self.recipe, self.variants, self.run.path)

    @cached_property
    def resident(self) -> Resident:
        """What it learns from by default, in memory, with all its variants beside it."""
        recipe, variants = self.over_its_teacher
        others = {name: checkpoint for name, checkpoint in variants.items() if name != recipe.base}
        return self.placement.resident(variants[recipe.base], others)

    @property
    def load_teacher(self) -> Callable[[], Resident] | None:
        """Loads the other teacher, if there is one."""
        teacher = self.teacher
        return None if teacher is None else lambda: self.placement.resident(teacher)


class _Texts:
    """What is trained on, what results are accepted by, and what is reported besides."""

    def __init__(self, subject: _Subject, text: TrainingText, evaluation: PerplexityTexts) -> None:
        """Files are read now.

        Raises:
            UserError: one cannot be read, or a streamed model would have to write text.
        """
        self.subject, self.text = subject, text
        self.tokenizer = load_tokenizer(subject.base)
        writes = any("self" in name.split(",") for name in text.sources)
        check(
            (
                not (writes and subject.placement.stream),
                "--data self lets the model write, and with --stream it is read anew for every token.",
                "Give a file or data set, or let it write once without --stream: what it writes is kept.",
            )
        )
        self.writes = writes
        self.parts = self._draw(text.tokens)
        self.evaluation = tuple(
            eval_corpus(name, self.tokenizer, seq_len=text.seq_len, windows=evaluation.windows)
            for name in evaluation.text
        )

    def check(self) -> None:
        """Find out now whether there is enough text; what the model writes comes later.

        Raises:
            UserError: there is not.
        """
        if not self.writes:
            _ = self.train, self.held_out

    @cached_property
    def _split(self) -> tuple[Corpus, Corpus]:
        corpus, seq_len = self.parts.calibration, self.text.seq_len
        number = max(1, min(round(len(corpus) / _HELD_OUT), _MOST_HELD_OUT // seq_len))
        train, held_out = corpus.split(1.0 - number / len(corpus) if len(corpus) > 1 else 0.5)
        seen = _seen_tokens(self.subject.recipe, corpus, self.text.seed)
        if seen > train.tokens:
            progress.current().say(f"{seen} tokens of this text were fitted on before: later ones are held out")
            # A longer draw has the same sequences first.
            longer = self._draw(seen + len(held_out) * seq_len).calibration
            held_out = longer.split(1.0 - len(held_out) / len(longer))[1]
        return train, replace(held_out, description="held-out text")

    @property
    def train(self) -> Corpus:
        """What is fitted and trained on."""
        return self._split[0]

    @property
    def held_out(self) -> Corpus:
        """What results are accepted by: not what the recipe was fitted on before, either."""
        return self._split[1]

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {
            "train": {"sha256": self.train.sha256, "tokens": self.train.tokens},
            "held_out": {"sha256": self.held_out.sha256, "tokens": self.held_out.tokens},
            "evaluation": {text.description: text.sha256 for text in self.evaluation},
        }

    def _draw(self, tokens: int) -> TextParts:
        text = replace(self.text, tokens=tokens)
        return draw(text, self.tokenizer, writer=lambda: self.subject.resident.model, writer_key=self.subject.sha256)


def _seen_tokens(recipe: Recipe, corpus: Corpus, seed: int) -> int:
    """Tokens of this very text, from the first on, that what a recipe holds was fitted on."""
    said = recipe.provenance.get("calibration") or {}
    same = {"text": corpus.description, "seq_len": corpus.seq_len, "seed": seed}
    fits = bool(recipe.fitted) and all(said.get(name) == value for name, value in same.items())
    return int(said.get("tokens", 0)) if fits else 0


def _layers(recipe: Recipe, healed: Healed) -> tuple[dict[str, Any], ...]:
    first, last = healed.stages[0].quality, healed.stages[-1].quality
    rows = zip(recipe.spans, first["errors"], last["errors"], strict=True)
    return tuple(
        {"layer": index, "span": f"{start}-{stop - 1}", "error_before": before, "error_after": after}
        for index, ((start, stop), before, after) in enumerate(rows)
    )
