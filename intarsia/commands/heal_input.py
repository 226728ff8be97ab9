"""What `heal` works on: the recipe over its opened checkpoints, what it learns from, and the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from intarsia import progress
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.hashing import acting_config, scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.commands.family_check import verified
from intarsia.commands.job import Placement, load_tokenizer
from intarsia.commands.recipes import open_variants, read_recipe
from intarsia.data.corpus import Corpus
from intarsia.data.text import TextParts, draw
from intarsia.errors import UserError, check
from intarsia.evaluation.perplexity import eval_corpus
from intarsia.healing import launch
from intarsia.healing.blend import BLEND, blend_sha256, over_its_blend
from intarsia.healing.layer_map import check_teacher
from intarsia.options import Runtime, TextSpec
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.run_dir import RunDir

_HELD_OUT, _MOST_HELD_OUT = 16, 16_384
"""One sequence in 16 is held out, up to 16,384 tokens: measuring must not take longer than training."""


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
class Subject:
    """What is healed: a recipe over opened checkpoints, and what it learns from."""

    recipe: Recipe
    variants: Mapping[str, Checkpoint]
    run: RunDir
    # Another teacher than the recipe's base, or than its blend.
    teacher: Checkpoint | None
    placement: Placement

    @classmethod
    def opened(cls, recipe: Recipe, run: RunDir, teacher: str | None, runtime: Runtime) -> Subject:
        """Open all checkpoints.

        Raises:
            UserError: one cannot be opened, or the teacher does not fit.
        """
        variants = {name: verified(each) for name, each in open_variants(recipe, progress.current()).items()}
        placed = Placement.of(runtime)
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
    def resident(self) -> LoadedModel:
        """What it learns from by default, in memory, with all its variants beside it."""
        recipe, variants = self.over_its_teacher
        others = {name: checkpoint for name, checkpoint in variants.items() if name != recipe.base}
        return self.placement.resident(variants[recipe.base], others)

    @property
    def load_teacher(self) -> Callable[[], LoadedModel] | None:
        """Loads the other teacher, if there is one."""
        teacher = self.teacher
        return None if teacher is None else lambda: self.placement.resident(teacher)


class Texts:
    """What is trained on, what results are accepted by, and what is reported besides."""

    def __init__(self, subject: Subject, text: TextSpec, evaluation: Sequence[str], *, windows: int) -> None:
        """Files are read now.

        Args:
            text: what is trained on, with the part of it that is held out.
            evaluation: further texts, and how many `windows` of each.

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
            eval_corpus(name, self.tokenizer, seq_len=text.seq_len, windows=windows) for name in evaluation
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
