"""The run folder of a search (`intarsia.run_dir`), beside the settings that it pins:

- `tailor.json`: what is known of it: the members with the hashes of their weights, the space, the budgets, what the
  base costs on the greatest of them, the objectives with the hashes of their examples, engine, seed, device and dtype.
- `family.yaml`: the family file, its paths made absolute.
- `wanted.json`: how many trials are asked for.
- `sensitivities.safetensors`, `warm_start.json`, `plans/METHOD/`: what the search starts with.
- `trials.jsonl`: the log (`intarsia.tailoring.history.Trial`).
- `front.json`: the Pareto front (`Front.to_dict`), written anew whenever it changes, with `judged` once the incumbent
  is scored on what the search never saw.
- `fits/`: while it searches, what was fitted for trials that are under way or lead at their budget.
- `front/trial-N.yaml`: the recipes of the front; `best/`: the incumbent, built; `report.html`: the page about all that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from intarsia.disk import damage_named, read_json
from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.run_dir import RunDir
from intarsia.tailoring.history import EARLIER, TRIALS, History, Trial
from intarsia.tailoring.pareto import Front, front_of

FACTS, FAMILY, WANTED, FRONT = "tailor.json", "family.yaml", "wanted.json", "front.json"
_EXPECTED, _REMEDY = "what the search wrote", "Search into another folder."


def is_tailor_run(path: Path) -> bool:
    """Whether a folder is that of a search."""
    return (path / FACTS).is_file()


class TailorRun(RunDir):
    """The folder of a search. What is read once is not read again; `trials` and `front` are as they were then."""

    def __init__(self, path: str | Path, *, option: str = "-o") -> None:
        super().__init__(path, option=option)

    @classmethod
    def existing(cls, path: str | Path, *, made_by: str = "intarsia tailor family.yaml -o DIR") -> TailorRun:
        """The folder of a search, to read or to resume.

        Raises:
            UserError: there is none.
        """
        if not is_tailor_run(Path(path)):
            raise UserError(f"{path} is not the folder of a search.", f"Make one with `{made_by}`.")
        return cls(path)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What is known of the search: `tailor.json`."""
        return self._json(FACTS)

    @cached_property
    def family(self) -> str:
        """The family file."""
        path = self.path / FAMILY
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @property
    def history(self) -> History:
        """The log as it is now."""
        return History(self.path / TRIALS)

    @cached_property
    def trials(self) -> Sequence[Trial]:
        """All trials."""
        return self.history.trials

    @property
    def made(self) -> list[Trial]:
        """The trials of this search, without those of earlier searches."""
        return [trial for trial in self.trials if trial.engine != EARLIER]

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives, in the order of the costs."""
        return [str(entry["name"]) for entry in self.settings["objectives"]]

    @property
    def base(self) -> Mapping[str, float]:
        """The base model's costs on the examples of the greatest budget; empty where they were not kept."""
        return self.settings.get("base") or {}

    @cached_property
    def front(self) -> Front | None:
        """The Pareto front of the trials."""
        with damage_named(self.path / FACTS, expected=_EXPECTED, remedy=_REMEDY):
            return front_of(self.trials, self.objectives, max_budget=max(self.settings["budgets"]))

    @property
    def final(self) -> dict[str, Any] | None:
        """The final scores on examples that the search has not seen."""
        found = self._json(FRONT).get("judged") if (self.path / FRONT).is_file() else None
        return found if isinstance(found, dict) else None

    def write_front(self, front: Front, final: Mapping[str, Any] | None = None) -> None:
        """Write `front.json`."""
        self.write_json(FRONT, {**front.to_dict(), **({} if final is None else {"judged": final})})

    @property
    def wanted(self) -> int:
        """How many trials are asked for; 0 if nobody has asked yet."""
        return int(self._json(WANTED)["trials"]) if (self.path / WANTED).is_file() else 0

    def want(self, trials: int) -> None:
        """Record how many trials are asked for, before the first of them is made."""
        self.write_json(WANTED, {"trials": trials})

    def recipe_path(self, number: int) -> Path:
        """Where the recipe of a trial of the front is, or will be."""
        return self.path / "front" / f"trial-{number:05d}.yaml"

    def recipe(self, trial: Trial) -> Recipe | None:
        """The recipe of a trial of the front, where it was written."""
        path = self.recipe_path(trial.number)
        try:
            return schema.load(path) if path.is_file() else None
        except UserError:
            return None

    @property
    def fits(self) -> Path:
        """Where fits of trials are kept during the search."""
        return (self.path / "fits").absolute()

    @property
    def best(self) -> Path:
        """Where the incumbent is built."""
        return self.path / "best"

    @property
    def report(self) -> Path:
        """Where the page about the search is."""
        return self.path / "report.html"

    def chosen(self, *, best: str | None = None, knee: bool = False, trial: int | None = None) -> Trial:
        """The trial that is asked for: the best in an objective, the knee of the front, or by its number.

        Raises:
            UserError: more than one of them is asked for, there is no such objective or trial, or it has failed.
        """
        if sum([best is not None, knee, trial is not None]) > 1:
            raise UserError("--best, --knee and --trial choose one trial each.", "Give one of them.")
        if trial is not None:
            return self._numbered(trial)
        if self.front is None:
            raise UserError(f"No trial of {self.path} has succeeded yet.", "Let `intarsia tailor` continue.")
        if best is not None and best not in self.front.objectives:
            known = ", ".join(self.front.objectives)
            raise UserError(f"--best {best} is no objective of the search.", f"Name one of {known}.")
        return self.front.knee if best is None else self.front.best(best)

    def _numbered(self, number: int) -> Trial:
        if not 0 <= number < len(self.trials):
            raise UserError(
                f"--trial is {number}; the search has {len(self.trials)} trials, from 0.",
                f"Take the number of a line in {TRIALS}.",
            )
        found = self.trials[number]
        if found.status == "failed":
            raise UserError(f"--trial {number} has failed: {found.reason}.", "Choose another one.")
        return found

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name, expected=_EXPECTED, remedy=_REMEDY)
