"""What a compression gave, and what healing did in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from intarsia.pruning.estimate import Estimate
from intarsia.recipe.recipe import Recipe
from intarsia.stages.judge import Measures
from intarsia.stages.repair import Repaired


@dataclass(frozen=True, kw_only=True)
class CompressResult:
    """What a compression gave. `before`, `after` and the rest are None for a dry run, which only estimates.

    `healed`: how the cut model was repaired, and the share of the gap in log-perplexity that this closed. None where
    nothing was to be healed.
    """

    model: str
    method: str
    target: int
    estimate: Estimate
    before: Measures | None = None
    after: Measures | None = None
    healed: dict[str, Any] | None = None
    evaluation: str | None = None
    layer_forwards: float | None = None
    seconds: float
    peak_memory_bytes: int
    recipe_sha256: str | None = None
    report: Path | None = None
    out: Path
    run: Path

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = {**asdict(self), "out": str(self.out), "run": str(self.run)}
        data["report"] = None if self.report is None else str(self.report)
        for key in ("before", "after"):
            measures: Measures | None = getattr(self, key)
            data[key] = None if measures is None else measures.to_dict()
        if self.before is not None:  # the work is done
            del data["estimate"]
        return data


def bare(recipe: Recipe) -> Recipe | None:
    """The recipe with nothing fitted, where something is."""
    return replace(recipe, fitted={}) if recipe.fitted else None


def healed(repair: Repaired | None, cut: Recipe, before: Measures, after: Measures) -> dict[str, Any] | None:
    """How the cut model was repaired, and the share of the gap that this closed; None where nothing was to heal."""
    on_the_way = sum(len(tensors) for tensors in cut.fitted.values())
    if repair is None and not on_the_way:
        return None
    found: dict[str, Any] = {
        "method": "closed-form" if repair is not None else "closed-form in the loop",
        "taken": repair is None or repair.taken,
        "fitted_read_outs": on_the_way if repair is None else repair.read_outs if repair.taken else 0,
        "tokens": cut.provenance["calibration"]["tokens"] if repair is None else repair.tokens,
    }
    if on_the_way and (repair is None or repair.goes_on):
        found["fitted_in_loop"] = on_the_way
    if repair is not None and repair.start is not None:
        found["start"] = repair.start
    whole, bare, now = before.perplexity, after.perplexity_without_heal, after.perplexity
    if whole is not None and bare is not None and now is not None and bare.nll > whole.nll:
        found["gap_closed"] = (bare.nll - now.nll) / (bare.nll - whole.nll)
    return found
