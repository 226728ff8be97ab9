"""What healing gave, and what is told of it in the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.data.corpus import Corpus
from intarsia.recipe.recipe import Recipe
from intarsia.stages.heal_record import StageResult


@dataclass(frozen=True, kw_only=True)
class HealResult:
    """What healing gave.

    Attributes:
        stages: a row for the model as it came, and one for every stage: perplexities (held-out text first), the mean
            relative error of hidden states, tokens, seconds, and whether the stage's work was taken.
        layers: for every output layer the error of its hidden state before and after.
        details: what the stages themselves report, layer by layer.
    """

    source: Path
    out: Path
    run: Path
    teacher: str
    stages: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...]
    details: dict[str, list[dict[str, Any]]]
    recipe_sha256: str
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "source": str(self.source), "out": str(self.out), "run": str(self.run)}


def provenance(settings: dict[str, Any], corpus: Corpus, results: Sequence[StageResult]) -> dict[str, Any]:
    """What a healed recipe tells of how it was healed. The configs are whole models' own: the run folder has them."""
    told = {name: value for name, value in settings.items() if name not in ("config", "teacher_config")}
    text = {"description": corpus.description, "sha256": corpus.sha256, "tokens": corpus.tokens}
    return {"settings": told, "text": text, "stages": [result.row() for result in results]}


def layer_errors(recipe: Recipe, results: Sequence[StageResult]) -> tuple[dict[str, Any], ...]:
    """For every output layer the span it stands for, and the error of its hidden state before and after."""
    first, last = results[0].quality, results[-1].quality
    rows = zip(recipe.spans, first["errors"], last["errors"], strict=True)
    return tuple(
        {"layer": index, "span": f"{start}-{stop - 1}", "error_before": before, "error_after": after}
        for index, ((start, stop), before, after) in enumerate(rows)
    )
