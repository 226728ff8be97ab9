"""`intarsia heal`: fit and train a pruned model toward the original, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from intarsia import progress
from intarsia.building.loaded_model import Resident
from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.hashing import acting_config, scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.checkpoint.staging import check_out
from intarsia.commands.job import Placement, check_seq_len, load_tokenizer
from intarsia.data.corpus import Corpus
from intarsia.data.text import draw
from intarsia.errors import UserError, check
from intarsia.evaluation.perplexity import eval_corpus
from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.flags import Flag, flag
from intarsia.healing import launch
from intarsia.healing.blend import BLEND, back, blend_sha256, forget, over_its_blend
from intarsia.healing.layer_map import check_teacher
from intarsia.healing.pipeline import Healed, HealContext, check_stages, pinned, run_stages
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
    started = time.perf_counter()
    source, out, main = Path(source), HealedModel.of(out), launch.rank() == 0
    chosen = heal_stages.choose_all(stages)
    check((bool(chosen), "--stages names no heal stage.", f"Name some of {', '.join(heal_stages.names)}."))
    check_stages(chosen, runtime)
    send_off = push_later(out.push_to, private=out.private, progress=progress.current())
    recipe = read_source(source)
    if main:
        check_out(out.path, overwrite=out.overwrite)
    work = _Work(recipe, RunDir(out.run_path), text, evaluation, runtime, teacher)
    settings = work.settings() | {"stages": [each.name for each in chosen]} | {each.name: pinned(each) for each in chosen}

    with ExitStack() as stack:
        if main:
            work.run.check(settings)
            if work.blended and "self" in work.text.sources:  # the blend writes, so it is made before
                stack.enter_context(work.run.opened(settings))
            ...
