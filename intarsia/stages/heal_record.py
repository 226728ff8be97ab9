"""What healing keeps of every stage: a recipe, how good it is, and what the stage reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.disk import full_disk_named, read_json, write_whole
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A recipe behind a stage (`cut`: before the first), and how good it is (see `Quality`)."""

    stage: str
    recipe: Recipe
    quality: dict[str, Any]
    taken: bool = True
    tokens: int = 0
    seconds: float = 0.0
    details: list[dict[str, Any]]

    def row(self) -> dict[str, Any]:
        """One line of the report."""
        held_out, *texts = self.quality["texts"]
        errors = self.quality["errors"]
        return {
            "stage": self.stage,
            "held_out_perplexity": held_out["value"],
            **{f"perplexity of {Path(text['text']).name}": text["value"] for text in texts},
            "hidden_error": sum(errors) / len(errors),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "taken": self.taken,
        }


def write_result(record: Path, result: StageResult) -> None:
    """The recipe first: a stage is done when its facts are there."""
    with full_disk_named(record.parents[1]):
        record.parent.mkdir(parents=True, exist_ok=True)
        schema.save(result.recipe, record.with_suffix(".yaml"))
        facts = {
            field: getattr(result, field) for field in ("stage", "quality", "taken", "tokens", "seconds", "details")
        }
        write_whole(record.with_suffix(".json"), json.dumps(facts) + "\n")


def read_result(record: Path) -> StageResult:
    """A finished stage.

    Raises:
        UserError: what is kept of it is damaged.
    """
    remedy = "Delete it; that stage of healing is then done again."
    facts = read_json(record.with_suffix(".json"), expected="what a stage of healing gave", remedy=remedy)
    return StageResult(recipe=schema.load(record.with_suffix(".yaml")), **facts)
