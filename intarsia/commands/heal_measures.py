"""What `heal` measures of the original, of the model as it came, and of the healed one: perplexity and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from intarsia.activations.hidden_store import MemoryBudget
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.build import BuildResult
from intarsia.commands.recipes import card_facts
from intarsia.commands.report import REPORT
from intarsia.data.corpus import Corpus
from intarsia.disk import write_whole
from intarsia.evaluation.agreement import Asked, doubt
from intarsia.evaluation.perplexity import model_of, perplexity
from intarsia.evaluation.results import Agreement
from intarsia.healing.pipeline import HealContext, Healed
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.card import model_card
from intarsia.reporting.model_report import keep_measures
from intarsia.reporting.page import write_report


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measures by model: `original`, `as it came`, and `healed` where a stage was accepted."""

    rows: Mapping[str, Mapping[str, Any]]
    # Of the last of them.
    answers: Agreement

    @classmethod
    def of(cls, context: HealContext, healed: Healed, asked: Asked, *, seed: int, key: str) -> Measured:
        """Let all of them answer; the perplexities of the recipes are known.

        Args:
            key: the hash of the original's weights.
        """
        budget = MemoryBudget(context.memory_bytes)
        original = model_of(None, context.resident, memory_budget=budget)
        reference = asked.answered(original, seed=seed, key=key)
        whole, answers = asdict(perplexity(original, context.held_out)), reference.itself()
        rows = {"original": _row(whole, answers)}
        stages = {"as it came": healed.stages[0], **({"healed": healed.stages[-1]} if healed.taken else {})}
        for name, stage in stages.items():
            model = model_of(stage.recipe, context.resident, memory_budget=budget)
            answers = reference.score(reference.follow(model), original)
            rows[name] = _row(stage.quality["texts"][0], answers)
        return cls(rows=rows, answers=answers)

    @property
    def table(self) -> tuple[dict[str, Any], ...]:
        """A row a model."""
        return tuple({"model": name, **row} for name, row in self.rows.items())

    @property
    def warning(self) -> str | None:
        """One sentence, where perplexity looks well and the answers do not."""
        rows = list(self.rows.values())
        return doubt(rows[0], rows[-1])


def _row(perplexity: Mapping[str, Any], answers: Agreement) -> dict[str, Any]:
    return {"perplexity": {name: perplexity[name] for name in ("value", "stderr")}, **answers.measures()}


def report(built: BuildResult, recipe: Recipe, base: Checkpoint, measured: Measured | None, text: Corpus) -> None:
    """Write the report of a healed model, and what was measured into its card.

    Args:
        text: what perplexity was measured on.
    """
    if measured is not None:
        rows = list(measured.rows.values())
        facts = card_facts(recipe, base, built, title=built.out.name)
        facts |= {"before": {**facts["before"], **rows[0]}, "after": {**facts["after"], **rows[-1]}}
        facts |= {"warning": measured.warning, "evaluation": text.description}
        write_whole(built.out / "README.md", model_card(facts))
        evaluation = {"text": text.description, "sha256": text.sha256, "windows": len(text), "seq_len": text.seq_len}
        kept = {name: facts[name] for name in ("model", "before", "after", "warning")}
        kept |= {"answers": asdict(measured.answers), "models": measured.table, "evaluation": evaluation}
        keep_measures(built.out, kept)
    write_report([built.out], built.out / REPORT)
