"""What the folder of a search over a family holds, for a report: the files are told of in docs/TAILOR.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.disk import damage_named, read_json
from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.history import EARLIER, TRIALS, History, Trial
from intarsia.tailoring.pareto import Front, front_of

SETTINGS, FAMILY, WANTED, FRONT = "tailor.json", "family.yaml", "wanted.json", "front.json"
_WRITTEN, _REMEDY = "what the search wrote", "Search into another folder."


def recipe_path(folder: Path, number: int) -> Path:
    """Where the recipe of a trial of the front is (or will be)."""
    return folder / "front" / f"trial-{number:05d}.yaml"


@dataclass(frozen=True, kw_only=True)
class TailorRun:
    """What the folder of a search holds so far. `base`: what the uncut base costs, where that was kept."""

    path: Path
    settings: Mapping[str, Any]
    family: str
    trials: Sequence[Trial]
    front: Front | None
    judged: Mapping[str, Any] | None
    wanted: int

    @property
    def objectives(self) -> list[str]:
        """Their names, in the order of the costs."""
        return [str(entry["name"]) for entry in self.settings["objectives"]]

    @property
    def base(self) -> Mapping[str, float]:
        """What the uncut base costs on the examples of the greatest budget; empty where it was not kept."""
        return self.settings.get("base") or {}

    @property
    def made(self) -> list[Trial]:
        """The trials of this search, without those of earlier ones."""
        return [trial for trial in self.trials if trial.engine != EARLIER]

    def recipe(self, trial: Trial) -> Recipe | None:
        """The recipe of a trial of the front, where it was written."""
        path = recipe_path(self.path, trial.number)
        try:
            return schema.load(path) if path.is_file() else None
        except UserError:
            return None


def is_tailor_run(path: Path) -> bool:
    """Whether a folder is that of a search."""
    return (path / SETTINGS).is_file()


def load(path: Path) -> TailorRun:
    """Everything that the folder of a search holds so far.

    Raises:
        UserError: a file of it is damaged.
    """
    settings = _json(path / SETTINGS)
    trials = History(path / TRIALS).trials
    front = _json(path / FRONT) if (path / FRONT).is_file() else {}
    wanted = _json(path / WANTED)["trials"] if (path / WANTED).is_file() else 0
    family = path / FAMILY
    with damage_named(path / SETTINGS, expected=_WRITTEN, remedy=_REMEDY):
        names = [str(entry["name"]) for entry in settings["objectives"]]
        found = front_of(trials, names, max_budget=max(settings["budgets"]))
    return TailorRun(
        path=path,
        settings=settings,
        family=family.read_text(encoding="utf-8") if family.is_file() else "",
        trials=trials,
        front=found,
        judged=front.get("judged"),
        wanted=int(wanted),
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, expected=_WRITTEN, remedy=_REMEDY)
