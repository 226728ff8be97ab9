"""The run folder of a search (`intarsia.run_dir`), beside the settings that it pins:

- `tailor.json`: the members with the hashes of their weights, the space, the budgets, the base's costs on the greatest
  of them, the objectives with the hashes of their examples, engine, seed, device and dtype.
- `family.yaml`: the family file, its paths made absolute.
- `wanted.json`: how many trials are asked for.
- `sensitivities.safetensors`, `warm_start.json`, `plans/METHOD/`: what the search starts with.
- `trials.jsonl`: the log (`intarsia.tailoring.history.Trial`).
- `front.json`: the Pareto front (`Front.to_dict`), written whenever it changes; `evaluated` are the final scores.
- `fits/`: during the search, healed recipes of trials that are running or lead at their budget.
- `front/trial-N.yaml`: the recipes of the front; `best/`: the incumbent, built; `report.html`: the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.disk import damage_named, read_json, write_whole
from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.run_dir import RunDir
from intarsia.tailoring.history import EARLIER, TRIALS, Front, History, Trial, front_of

if TYPE_CHECKING:
    from intarsia.tailoring.family import Family
    from intarsia.tailoring.family_file import FamilyFile
    from intarsia.tailoring.space import Space

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
        found = self._json(FRONT).get("evaluated") if (self.path / FRONT).is_file() else None
        return found if isinstance(found, dict) else None

    def write_front(self, front: Front, final: Mapping[str, Any] | None = None) -> None:
        """Write `front.json`."""
        self.write_json(FRONT, {**front.to_dict(), **({} if final is None else {"evaluated": final})})

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

    def describe(self, file: FamilyFile, family: Family, space: Space, *, engine: str) -> dict[str, Any]:
        """What `tailor.json` records of the family and the space."""
        return {
            "kind": "tailor",
            "members": {
                variant.name: {"model": variant.model, "revision": variant.revision, "sha256": variant.sha256}
                for variant in family.variants()
            },
            "space": {
                "kind": space.kind,
                "depth": space.depth,
                "target": space.target,
                "log10_size": round(space.log10_size, 3),
            },
            "engine": engine,
            "seed": file.search.seed,
            "heal": file.heal,
        }

    def pins(self, file: FamilyFile, facts: Mapping[str, Any], *, examples: Any) -> dict[str, Any]:
        """The settings that a resumed search must share; the number of trials may differ.

        Args:
            examples: the hash of each objective's examples; `...` before they are read.
        """
        family = file.model_dump(exclude={"search": {"trials"}})
        family["objectives"] = {entry["name"]: entry for entry in family["objectives"]}
        return {
            "family": family,
            "weights": {name: member["sha256"] for name, member in facts["members"].items()},
            "config": facts["config"],
            "examples": examples,
        }

    def start(
        self,
        file: FamilyFile,
        facts: Mapping[str, Any],
        *,
        costs: Sequence[float] | None,
        examples: Mapping[str, str],
    ) -> None:
        """Write the family file and `tailor.json` of a new search.

        Args:
            costs: the base's, one for each objective.
            examples: the hash of each objective's examples.
        """
        objectives = [
            {
                "name": objective.name,
                "kind": objective.kind,
                "source": objective.source,
                "metric": objective.metric if objective.kind == "task" else None,
                "split": list(objective.split),
                "sha256": examples.get(objective.name),
            }
            for objective in file.objectives
        ]
        names = [objective.name for objective in file.objectives]
        base = None if costs is None else dict(zip(names, costs, strict=True))
        write_whole(self.artifact(FAMILY), "# The family file, its paths made absolute.\n" + file.to_yaml())
        self.write_json(FACTS, {**facts, "base": base, "objectives": objectives})

    @property
    def fits(self) -> Path:
        """Where fits of trials are kept during the search."""
        return (self.path / "fits").absolute()

    @property
    def best(self) -> Path:
        """Where the incumbent is built."""
        return self.path / "best"

    def has_built(self, sha256: str) -> bool:
        """Whether the incumbent that is built has a recipe of this hash."""
        from intarsia.building.materialize import RECIPE_FILE

        path = self.best / RECIPE_FILE
        try:
            return path.is_file() and schema.content_hash(schema.load(path)) == sha256
        except UserError:
            return False

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
