"""What the run folder of a plan holds, for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intarsia.disk import read_json
from intarsia.planning.run_folder import RunFolder
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """What a run folder holds. `recipes` are by depth, the greatest first; `unfinished`: how far it is, where it is."""

    path: Path
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    calibration: Mapping[str, Any]
    recipes: Mapping[int, Recipe]
    unfinished: str | None = None

    @property
    def steps(self) -> dict[int, Mapping[str, Any]]:
        """The log by depth."""
        return {int(step["layers"]): step for step in self.log}

    @property
    def evidence(self) -> Mapping[str, Any]:
        """What the first step was decided on: the whole model's measures."""
        return self.log[0]["evidence"] if self.log else {}


def is_plan_run(path: Path) -> bool:
    """Whether a folder is the run of a plan (that of healing has other settings)."""
    try:
        settings = RunFolder(path).settings()
    except (OSError, ValueError):
        return False
    return "method" in settings and "calibration" in settings


def load_run(path: Path) -> PlanRun:
    """Everything that the folder of a plan holds so far.

    Raises:
        UserError: a file of it is damaged.
    """
    run = RunFolder.existing(path)
    log = run.log()
    pinned = path / "calibration.json"
    return PlanRun(
        path=path,
        settings=run.settings(),
        log=log,
        calibration=_pinned(pinned) if pinned.is_file() else {},
        recipes={int(step["layers"]): _bare(schema.load(run.recipe_path(int(step["layers"])))) for step in log},
        unfinished=run.unfinished(),
    )


def _pinned(path: Path) -> dict[str, Any]:
    remedy = "The run folder is damaged; delete it and plan again."
    return read_json(path, expected="what was recorded of the calibration text", remedy=remedy)


def _bare(recipe: Recipe) -> Recipe:
    """Without fitted tensors, of which a ladder of a large model has more than memory holds."""
    return replace(recipe, fitted={})


def provenance_of(run: PlanRun) -> Mapping[str, Any]:
    """How the recipes of the run came to be."""
    return next(iter(run.recipes.values())).provenance if run.recipes else {}
