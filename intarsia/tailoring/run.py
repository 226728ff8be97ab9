"""The run folder of a search (`intarsia.run_dir`), beside the settings that it pins:

- `tailor.json`: the members with the hashes of their weights, the space, the budgets, the base's costs on the greatest
  of them, the objectives with the hashes of their examples, engine, seed, device and dtype.
- `family.yaml`: the family file, its paths made absolute.
- `wanted.json`: the wanted number of trials.
- `sensitivities.safetensors`, `warm_start.json`, `plans/METHOD/`: the inputs of the search.
- `trials.jsonl`: the log (`Trial`).
- `front.json`: the Pareto front (`Front.to_dict`), written whenever it changes; `evaluated` are the final scores.
- `fits/`: during the search, healed recipes of running trials and of those that lead at their budget.
- `front/trial-N.yaml`: the recipes of the front; `best/`: the incumbent, built; `report.html`: the report.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PlainSerializer, TypeAdapter

from intarsia.disk import damage_named, write_whole
from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.run_dir import Log, RunDir
from intarsia.tailoring.candidate import Plain
from intarsia.tailoring.engine import Costs, order

if TYPE_CHECKING:
    from intarsia.tailoring.evaluator import Evaluator
    from intarsia.tailoring.family import Family
    from intarsia.tailoring.family_file import FamilyFile
    from intarsia.tailoring.space import Space

TRIALS = "trials.jsonl"
EARLIER = "earlier"
"""The engine name of trials taken over from an earlier search. They do not count toward the goal."""
Key = tuple[str, int]
"""A recipe's hash and a budget: a pair is never evaluated twice."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate evaluated at a budget, or failed."""

    # Its index in the log, from 0.
    number: int
    # The engine that asked for it, and its origin: `warm start: sleb`, `random`, `promotion`, ...
    engine: str
    origin: str
    # The content hash of its recipe.
    recipe: str
    budget: int
    seed: int
    status: Literal["ok", "failed"]
    # One cost for each objective, lower is better; None if it failed.
    costs: tuple[float, ...] | None = None
    # The number of examples of each objective.
    examples: tuple[int, ...] = ()
    # The cost of the trial, in passes of one layer over the tokens of the budget.
    layer_forwards: float = 0.0
    seconds: Annotated[float, PlainSerializer(lambda seconds: round(seconds, 4))] = 0.0
    worker: str = "0"
    # Number of attempts, and why the last one failed.
    attempts: int = 1
    reason: str | None = None
    candidate: Plain

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (self.costs is not None) == (self.reason is None)

    @property
    def key(self) -> Key:
        """The recipe's hash and the budget, which identify the trial."""
        return self.recipe, self.budget


_TRIALS = TypeAdapter(Trial)


class History:
    """The trials of a run, in the order in which they finished."""

    def __init__(self, path: Path) -> None:
        """Read the log without writing, so that reading does not disturb a running search.

        Raises:
            UserError: a line other than the last is not a trial.
        """
        self.path = path
        self._log = Log(path)
        self._trials: list[Trial] = []
        for number, line in self._log.numbered():
            try:
                self._trials.append(_TRIALS.validate_python(line))
            except ValueError as error:
                raise UserError(
                    f"Line {number} of {path} is no trial: {' '.join(str(error).split())}.",
                    "Correct the line, or search into another folder.",
                ) from error
        self._by_key = {trial.key: trial for trial in self._trials}

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials."""
        return tuple(self._trials)

    @property
    def made(self) -> tuple[Trial, ...]:
        """The trials of this search, without those taken over."""
        return tuple(trial for trial in self._trials if trial.engine != EARLIER)

    def find(self, key: Key) -> Trial | None:
        """The trial of a recipe at a budget, if there was one."""
        return self._by_key.get(key)

    def take_over(self, trials: Iterable[Trial]) -> None:
        """Add trials of an earlier search that are not in the log yet."""
        for trial in trials:
            if trial.key not in self._by_key:
                self.append(replace(trial, number=len(self), engine=EARLIER))

    def append(self, trial: Trial) -> None:
        """Append a trial; it is on disk when this returns."""
        assert trial.number == len(self._trials) and trial.key not in self._by_key
        self._log.append(_TRIALS.dump_python(trial))
        self._trials.append(trial)
        self._by_key[trial.key] = trial


def _costs(trial: Trial) -> tuple[float, ...]:
    assert trial.costs is not None
    return trial.costs


def dominates(first: Costs, second: Costs) -> bool:
    """Whether the first is better in one cost and worse in none."""
    pairs = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def non_dominated(costs: Sequence[Costs]) -> list[int]:
    """The indices of non-dominated costs; the first of equal ones."""
    found = []
    for index, row in enumerate(costs):
        beaten = any(dominates(other, row) for other in costs)
        twin = any(tuple(costs[before]) == tuple(row) for before in range(index))
        if not beaten and not twin:
            found.append(index)
    return found


@dataclass(frozen=True, kw_only=True)
class Front:
    """The Pareto front of a search."""

    objectives: tuple[str, ...]
    # The budget at which trials are compared, and whether it is the search's greatest.
    budget: int
    top: bool
    # The trials of the front, by ascending first cost, and all that succeeded at this budget.
    points: tuple[Trial, ...]
    rivals: tuple[Trial, ...]

    @property
    def knee(self) -> Trial:
        """The best trial of the front under equal weights: the least augmented Chebyshev value of the costs, each
        scaled from the least to the greatest of all trials at this budget.

        Scaled by the front alone, tiny differences between two points would count as much as large ones.
        """
        costs, among = [_costs(trial) for trial in self.points], [_costs(trial) for trial in self.rivals]
        return self.points[order(costs, [1.0 / len(self.objectives)] * len(self.objectives), among)[0]]

    def best(self, objective: str) -> Trial:
        """The trial of least cost in an objective."""
        at = self.objectives.index(objective)
        return min(self.points, key=lambda trial: (_costs(trial)[at], trial.number))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial: its costs, the objectives it is best in, and its origin."""
        return [
            {
                "trial": trial.number,
                **dict(zip(self.objectives, _costs(trial), strict=True)),
                "best": ", ".join(
                    [n for n in self.objectives if self.best(n) is trial] + ["knee"] * (trial is self.knee)
                ),
                "engine": trial.engine,
                "origin": trial.origin,
            }
            for trial in self.points
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain data.

        `points`: the trials as in the log, without their cost to run; `best`: the number of the best trial in each
        objective; `knee`: the number of the knee.
        """
        return {
            "objectives": list(self.objectives),
            "budget": self.budget,
            "top": self.top,
            "trials": len(self.rivals),
            "points": [
                {
                    "trial": trial.number,
                    "recipe": trial.recipe,
                    "costs": dict(zip(self.objectives, _costs(trial), strict=True)),
                    "engine": trial.engine,
                    "origin": trial.origin,
                }
                for trial in self.points
            ],
            "best": {name: self.best(name).number for name in self.objectives},
            "knee": self.knee.number,
        }


def front_of(trials: Iterable[Trial], objectives: Sequence[str], *, max_budget: int) -> Front | None:
    """The front of some trials; None if none succeeded."""
    fine = [trial for trial in trials if trial.costs is not None]
    if not fine:
        return None
    budget = max(trial.budget for trial in fine)
    rivals = [trial for trial in fine if trial.budget == budget]
    points = [rivals[index] for index in non_dominated([_costs(trial) for trial in rivals])]
    return Front(
        objectives=tuple(objectives),
        budget=budget,
        top=budget >= max_budget,
        points=tuple(sorted(points, key=lambda trial: (_costs(trial), trial.number))),
        rivals=tuple(rivals),
    )


def leading(trials: Iterable[Trial]) -> set[str]:
    """The hashes of recipes on the front of the greatest budget at which they were tried."""
    fine = [trial for trial in trials if trial.costs is not None]
    greatest: dict[str, int] = {}
    for trial in fine:
        greatest[trial.recipe] = max(trial.budget, greatest.get(trial.recipe, 0))
    found: set[str] = set()
    for budget in set(greatest.values()):
        rivals = [trial for trial in fine if trial.budget == budget]
        front = [rivals[index].recipe for index in non_dominated([_costs(trial) for trial in rivals])]
        found |= {recipe for recipe in front if greatest[recipe] == budget}
    return found


FACTS, FAMILY, WANTED, FRONT = "tailor.json", "family.yaml", "wanted.json", "front.json"


def is_tailor_run(path: Path) -> bool:
    """Whether a folder is the run folder of a search."""
    return (path / FACTS).is_file()


class TailorRun(RunDir):
    """The run folder of a search. Everything is read once and cached, also `front`."""

    def __init__(self, path: str | Path, *, option: str = "-o") -> None:
        super().__init__(path, option=option)

    @classmethod
    def existing(cls, path: str | Path, *, made_by: str = "intarsia tailor family.yaml -o DIR") -> TailorRun:
        """The existing folder of a search, to read or to resume.

        Raises:
            UserError: there is none.
        """
        if not is_tailor_run(Path(path)):
            raise UserError(f"{path} is not the folder of a search.", f"Make one with `{made_by}`.")
        return cls(path)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The facts of the search: `tailor.json`."""
        return self.read_json(FACTS)

    @property
    def family(self) -> str:
        """The family file."""
        path = self.path / FAMILY
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @cached_property
    def history(self) -> History:
        """The log, which a search appends to."""
        return History(self.path / TRIALS)

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials."""
        return self.history.trials

    @property
    def made(self) -> Sequence[Trial]:
        """The trials of this search, without those of earlier searches."""
        return self.history.made

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives, in the order of the costs."""
        return [str(entry["name"]) for entry in self.settings["objectives"]]

    @property
    def base(self) -> Mapping[str, float]:
        """The base model's costs at the greatest budget; empty if they were not recorded."""
        return self.settings.get("base") or {}

    @cached_property
    def front(self) -> Front | None:
        """The Pareto front of the trials."""
        with damage_named(self.path / FACTS, expected="what the search wrote", remedy="Search into another folder."):
            return front_of(self.trials, self.objectives, max_budget=max(self.settings["budgets"]))

    @property
    def final(self) -> dict[str, Any] | None:
        """The final scores on unseen examples."""
        found = self.read_json(FRONT).get("evaluated") if (self.path / FRONT).is_file() else None
        return found if isinstance(found, dict) else None

    def write_front(self, front: Front, final: Mapping[str, Any] | None = None) -> None:
        """Write `front.json`."""
        self.write_json(FRONT, {**front.to_dict(), **({} if final is None else {"evaluated": final})})

    @property
    def wanted(self) -> int:
        """The wanted number of trials; 0 before it is recorded."""
        return int(self.read_json(WANTED)["trials"]) if (self.path / WANTED).is_file() else 0

    def want(self, trials: int) -> None:
        """Record the wanted number of trials, before the first one."""
        self.write_json(WANTED, {"trials": trials})

    def recipe_path(self, number: int) -> Path:
        """The path of the recipe of a trial of the front, existing or not."""
        return self.path / "front" / f"trial-{number:05d}.yaml"

    def recipe(self, trial: Trial) -> Recipe | None:
        """The recipe of a trial of the front; None if it was not written."""
        path = self.recipe_path(trial.number)
        try:
            return schema.load(path) if path.is_file() else None
        except UserError:
            return None

    def describe(self, file: FamilyFile, family: Family, space: Space, *, engine: str) -> dict[str, Any]:
        """The facts of the family and the space for `tailor.json`."""
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

    def start(self, file: FamilyFile, facts: Mapping[str, Any], evaluator: Evaluator) -> None:
        """Write the family file and `tailor.json` of a new search, with the base's costs if they were measured."""
        objectives = [
            {
                "name": objective.name,
                "kind": objective.kind,
                "source": objective.source,
                "metric": objective.metric if objective.kind == "task" else None,
                "split": list(objective.split),
                "sha256": evaluator.data[objective.name],
            }
            for objective in file.objectives
        ]
        measured = evaluator.base
        base = None if measured is None else dict(zip(evaluator.objectives, measured.costs, strict=True))
        write_whole(self.artifact(FAMILY), "# The family file, its paths made absolute.\n" + file.to_yaml())
        self.write_json(FACTS, {**facts, "base": base, "objectives": objectives})

    @property
    def fits(self) -> Path:
        """The folder of trials' fits during the search, by recipe hash."""
        return (self.path / "fits").absolute()

    def keep_fits(self, hashes: Collection[str]) -> None:
        """Delete the fits of all other recipes."""
        for path in self.fits.glob("[!.]*"):
            if path.stem not in hashes:
                path.unlink(missing_ok=True)

    @property
    def best(self) -> Path:
        """The folder of the built incumbent."""
        return self.path / "best"

    def has_built(self, sha256: str) -> bool:
        """Whether the built incumbent has a recipe of this hash."""
        from intarsia.building.materialize import RECIPE_FILE

        path = self.best / RECIPE_FILE
        try:
            return path.is_file() and schema.content_hash(schema.load(path)) == sha256
        except UserError:
            return False

    @property
    def report(self) -> Path:
        """The path of the report."""
        return self.path / "report.html"

    def chosen(self, *, best: str | None = None, knee: bool = False, trial: int | None = None) -> Trial:
        """The chosen trial: the best in an objective, the knee of the front, or the one with a number.

        Raises:
            UserError: several are given, there is no such objective or trial, or it failed.
        """
        if sum([best is not None, knee, trial is not None]) > 1:
            raise UserError("More than one of --best, --knee and --trial is given.", "Give one of them.")
        if trial is not None:
            if not 0 <= trial < len(self.trials):
                raise UserError(
                    f"--trial is {trial}; the search has {len(self.trials)} trials, from 0.",
                    f"Take the number of a line in {TRIALS}.",
                )
            found = self.trials[trial]
            if found.status == "failed":
                raise UserError(f"Trial {trial} failed: {found.reason}.", "Choose another one.")
            return found
        if self.front is None:
            raise UserError(f"No trial of {self.path} has succeeded yet.", "Let `intarsia tailor` continue.")
        if best is not None and best not in self.front.objectives:
            known = ", ".join(self.front.objectives)
            raise UserError(f"--best {best} is no objective of the search.", f"Name one of {known}.")
        return self.front.knee if best is None else self.front.best(best)
