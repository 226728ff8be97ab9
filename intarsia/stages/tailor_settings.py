"""What decides every number of a search, for its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from intarsia.recipe.recipe import Variant
from intarsia.stages.tailor_input import Job
from intarsia.stages.versions import versions
from intarsia.tailoring.space import Space

if TYPE_CHECKING:
    from intarsia.tailoring.evaluator import Evaluator


def settings_of(
    job: Job,
    variants: Sequence[Variant],
    config: Mapping[str, Any],
    space: Space,
    budgets: Sequence[int],
    evaluator: Evaluator | None = None,
) -> dict[str, Any]:
    """The settings of a search. Without an evaluator, what is known before anything heavy.

    Args:
        variants: the members of the family, with the hashes of their weights.
        config: of the base, what changes the numbers (`scan.acting_config`).
    """
    file = job.file
    base, data = (None, {}) if evaluator is None else (evaluator.base, evaluator.data)
    plain = asdict(replace(file, search=replace(file.search, trials=0)))
    del plain["search"]["trials"]  # a search may go on
    return {
        "kind": "tailor",
        "family": plain,
        "members": {
            variant.name: {"model": variant.model, "revision": variant.revision, "sha256": variant.sha256}
            for variant in variants
        },
        "config": config,
        "space": {
            "kind": space.kind,
            "depth": space.depth,
            "target": space.target,
            "log10_size": round(space.log10_size, 3),
        },
        "budgets": list(budgets),
        "base": dict(zip(evaluator.objectives, base.costs, strict=True)) if evaluator and base else None,
        "objectives": [
            {
                "name": objective.name,
                "kind": objective.kind,
                "source": objective.source,
                "metric": objective.metric if objective.kind == "task" else None,
                "split": list(objective.split),
                "sha256": data.get(objective.name),
            }
            for objective in file.objectives
        ],
        "engine": file.search.engine,
        "seed": file.search.seed,
        "heal": file.heal,
        "device": job.device,
        "dtype": job.dtype,
        "versions": versions(),
    }
