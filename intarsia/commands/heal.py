"""`intarsia heal`: fit and train a pruned model toward the original, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from intarsia.commands.push import push_later, without_push
from intarsia.errors import check
from intarsia.flags import Flag, flag, plain
from intarsia.options import NewModel, Runtime, TextSpec
from intarsia.registry import heal_stages
from intarsia.run_dir import RunDir

if TYPE_CHECKING:
    from intarsia.healing.pipeline import Healed
    from intarsia.recipe.recipe import Recipe

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
    # What was sent to the hub.
    push: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**without_push(asdict(self)), "source": str(self.source), "out": str(self.out), "run": str(self.run)}


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
    text: TrainingText | str | Path,
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
    from intarsia.checkpoint.staging import check_no_input, check_out
    from intarsia.commands.heal_input import Subject, Texts, read_source
    from intarsia.commands.inputs import inputs_of
    from intarsia.commands.job import check_seq_len
    from intarsia.commands.recipes import build_recipe
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.healing import launch
    from intarsia.healing.blend import forget
    from intarsia.healing.pipeline import HealContext, check_stages, pinned, run_stages
    from intarsia.recipe import schema

    started, source, out = time.perf_counter(), Path(source), HealedModel.of(out)
    text = text if isinstance(text, TrainingText) else TrainingText(sources=(str(text),))
    main, run = launch.rank() == 0, RunDir(out.run_path)
    chosen = heal_stages.choose_all(stages)
    check((bool(chosen), "--stages names no heal stage.", f"Name some of {', '.join(heal_stages.names)}."))
    check_stages(chosen, runtime)
    send_off = push_later(out.push_to, private=out.private)
    recipe = read_source(source)
    models = [] if teacher is None else [teacher]
    files = [source, source.with_suffix(".safetensors")]  # a recipe has a side file
    inputs = inputs_of(models=models, recipe=recipe, texts=[*text.sources, *evaluation.text], files=files)
    if main:
        check_out(out.path, overwrite=out.overwrite, inputs=inputs)
        check_no_input(run.path, inputs)
    subject = Subject.opened(recipe, run, teacher, runtime)

    check_seq_len(subject.base, text.seq_len)
    texts = Texts(subject, text, evaluation.text, windows=evaluation.windows)
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
        account = healed.recipe.provenance["heal"] | {
            "settings": {k: v for k, v in settings.items() if "config" not in k}
        }
        given = subject.recipe
        final = replace(given, fitted=healed.recipe.fitted, provenance={**given.provenance, "heal": account})
        if main:
            build_recipe(
                final,
                out.path,
                overwrite=out.overwrite,
                max_shard_bytes=out.shard_bytes,
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


def _layers(recipe: Recipe, healed: Healed) -> tuple[dict[str, Any], ...]:
    first, last = healed.stages[0].quality, healed.stages[-1].quality
    rows = zip(recipe.spans, first["errors"], last["errors"], strict=True)
    return tuple(
        {"layer": index, "span": f"{start}-{stop - 1}", "error_before": before, "error_after": after}
        for index, ((start, stop), before, after) in enumerate(rows)
    )
