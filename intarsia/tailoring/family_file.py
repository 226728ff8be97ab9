"""family.yaml: a family of models, and what to search for (read by `intarsia.tailoring.family_file`).

Paths in it are relative to the folder in which the command runs, as on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from intarsia.checkpoint.resolve import DEMO
from intarsia.data_file import MAX_INDEX, read_yaml, shown
from intarsia.errors import Problem, UserError
from intarsia.evaluation.task_file import names_a_file
from intarsia.recipe.methods import METHODS
from intarsia.recipe.ops import MergeMethod
from intarsia.recipe.recipe import VARIANT_NAME
from intarsia.registry import planners

Operation = Literal["remove", "select", "merge", "concat", "stack"]
Engine = Literal["smac", "evolve", "random"]
Heal = Literal["none", "finalists", "every"]
Metric = Literal["accuracy", "margin", "likelihood"]
Range = tuple[float, float]
BASE = "base"
RANDOM_MIDDLE = "random-middle"


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """A model of the family as the user names it."""

    name: str
    model: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """One thing to be good at.

    `task`: an lm-eval task, or a JSONL file of questions, by `metric`; `loss`: the loss on a text, or on the targets of
    a JSONL file with queries and targets; `kl`: the divergence from the dense base on a text. `split` is the part of
    the file that the search may see.
    """

    name: str
    kind: Literal["task", "loss", "kl"]
    source: str
    split: Range = (0.0, 1.0)
    metric: Metric = "likelihood"


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How to search. Budgets are numbers of examples over the whole of an objective."""

    engine: Engine = "smac"
    trials: int = 100
    min_budget: int = 16
    max_budget: int = 256
    eta: int = 3
    seed: int = 0
    warm_start: tuple[str, ...] = (RANDOM_MIDDLE,)


@dataclass(frozen=True, kw_only=True)
class FamilyFile:
    """What a family.yaml says.

    Ranges are of values that the search may choose: `lambdas` how much of a difference to the base a merge adds
    (`merge.scale`), `densities` how much of it is kept, `shares` the first layer's in a join, `scales` what a kept
    layer's output is multiplied by.
    """

    base: MemberSpec
    variants: tuple[MemberSpec, ...]
    layers: int | None
    sparsity: float | None
    operations: tuple[Operation, ...]
    methods: tuple[MergeMethod, ...]
    lambdas: Range = (0.0, 1.5)
    densities: Range = (0.1, 0.9)
    shares: Range = (0.1, 0.9)
    scales: Range = (1.0, 1.0)
    separate: bool = False
    groups: int | None = None
    objectives: tuple[ObjectiveSpec, ...] = ()
    search: SearchSpec = SearchSpec()
    heal: Heal = "none"


_SOURCES = ("task", "loss", "kl")


def absolute(file: FamilyFile) -> FamilyFile:
    """The family file with absolute paths; names that are no path there is stay as they are."""

    def member(spec: MemberSpec) -> MemberSpec:
        return replace(spec, model=absolute_path(spec.model))

    return replace(
        file,
        base=member(file.base),
        variants=tuple(map(member, file.variants)),
        objectives=tuple(replace(each, source=_source(each.kind, each.source)) for each in file.objectives),
        search=replace(file.search, warm_start=tuple(map(_start, file.search.warm_start))),
    )


def absolute_data(path: Path) -> dict[str, Any]:
    """What a family file that was read without complaint says, as plain data with absolute paths."""
    data: dict[str, Any] = read_yaml(path, what="a family")
    data["base"] = _member(data["base"])
    if data.get("variants"):
        data["variants"] = {name: _member(entry) for name, entry in data["variants"].items()}
    data["objectives"] = [
        {key: _source(key, value) if key in _SOURCES else value for key, value in entry.items()}
        for entry in data["objectives"]
    ]
    if data.get("search") and data["search"].get("warm_start"):
        data["search"]["warm_start"] = [_start(start) for start in data["search"]["warm_start"]]
    return data


def absolute_path(name: str) -> str:
    """A file or folder that is there by its absolute path, with the part of a file that is asked for."""
    if name == DEMO:
        return name
    whole = Path(name).expanduser()
    if whole.exists():
        return str(whole.resolve())
    file, mark, part = name.partition("#")
    path = Path(file).expanduser()
    return f"{path.resolve()}{mark}{part}" if mark and path.exists() else name


def _source(kind: str, name: str) -> str:
    """A task of lm-eval keeps its name, whatever folder is called so."""
    return name if kind == "task" and not names_a_file(name) else absolute_path(name)


def _start(name: str) -> str:
    return name if name in (RANDOM_MIDDLE, *planners.names) else absolute_path(name)


def _member(entry: Any) -> Any:
    return absolute_path(entry) if isinstance(entry, str) else {**entry, "model": absolute_path(entry["model"])}


_MOST_REPORTED = 50


class Values:
    """Returns values that are as expected, and stand-ins for the others, with a problem for each in `problems`."""

    def __init__(self, where: str, remedy: str = "Mend the recipe.") -> None:
        self.problems: list[Problem] = []
        self.where, self.remedy = where, remedy

    def raise_problems(self) -> None:
        """Raise what was found, if anything; at most fifty problems are listed."""
        rest = len(self.problems) - _MOST_REPORTED
        if rest > 0:
            self.problems[_MOST_REPORTED:] = []
            self.wrong("", "no more of these", f"{rest} more problems", "Mend the first ones.")
        if self.problems:
            raise UserError(self.problems)

    def wrong(self, path: str, expected: str, found: str, remedy: str | None = None) -> None:
        place = f"{self.where}: {path}" if path else self.where
        self.problems.append(Problem(where=place, expected=expected, found=found, remedy=remedy or self.remedy))

    def mapping(self, value: Any, path: str, keys: tuple[str, ...], needed: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.wrong(path, f"a mapping with {', '.join(keys)}", shown(value))
            return {}
        for key in value:
            if key not in keys:
                self.wrong(path, f"only the keys {', '.join(keys)}", shown(key), "Remove it, or mend its spelling.")
        for key in needed:
            if key not in value:
                self.wrong(path, f"the key {key!r}", "none", "Add it.")
        return value

    def text(self, value: Any, path: str, expected: str = "a text") -> str:
        if isinstance(value, str) and value.strip() and value.isprintable() and len(value) <= 4096:
            return value
        self.wrong(path, expected, shown(value))
        return "?"

    def integer(self, value: Any, path: str, least: int = 0, most: int = MAX_INDEX) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.wrong(path, f"a whole number from {least} to {most}", shown(value))
        return least

    def number(self, value: Any, path: str) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_INDEX:
            return float(value)
        self.wrong(path, "a number", shown(value))
        return math.nan

    def array(self, value: Any, path: str, most: int) -> list[Any]:
        if isinstance(value, list) and 0 < len(value) <= most:
            return value
        self.wrong(path, f"a list of 1 to {most} entries", shown(value))
        return []


_KEYS = (
    "base variants target operations merge concat output_scale fusion objectives search heal".split()
)  # in the order in which people write them
_MOST = 100


def read_family_file(path: Path) -> FamilyFile:
    """Read a family.yaml. Its form is checked; whether the models fit each other is the business of `open_family`.

    Raises:
        UserError: with everything that is wrong with it.
    """
    return parse_family(read_yaml(path, what="a family"), where=str(path))


def parse_family(data: Any, *, where: str) -> FamilyFile:
    """The family that plain data describes.

    Raises:
        UserError: with everything that is wrong with it.
    """
    reader = _Reader(Values(where, remedy="Mend the file."))
    found = reader.family(data)
    reader.values.raise_problems()
    return found


class _Reader:
    """Walks through the data, collects problems, and returns stand-ins where it has reported one."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def family(self, data: Any) -> FamilyFile:
        found = self.values.mapping(data, "", tuple(_KEYS), ("base", "target", "objectives"))
        layers, sparsity = self.target(found.get("target")) if "target" in found else (None, None)
        operations = self.words(found.get("operations", ["remove", "select", "merge"]), "operations", Operation)
        merge = self.section(found, "merge", ("methods", "scale", "density", "parts"))
        self.needs(found, "merge", operations)
        methods = self.words(merge.get("methods", ["task_arithmetic"]), "merge.methods", MergeMethod, METHODS)
        parts = merge.get("parts", "together")
        if parts not in ("together", "separate"):
            self.values.wrong("merge.parts", "together or separate", shown(parts))
        concat = self.section(found, "concat", ("share",))
        self.needs(found, "concat", operations)
        fusion = self.section(found, "fusion", ("groups",))
        scales = self.range(found.get("output_scale", [1.0, 1.0]), "output_scale", 0.0, 10.0)
        if not scales[0] <= 1.0 <= scales[1]:
            self.values.wrong("output_scale", "a range with 1 in it, which leaves a layer as it is", shown([*scales]))
        heal = found.get("heal", "none")
        if heal not in get_args(Heal):
            self.values.wrong("heal", " or ".join(get_args(Heal)), shown(heal))
        return FamilyFile(
            base=self.member(BASE, found.get("base"), "base") if "base" in found else MemberSpec(name="?", model="?"),
            variants=self.variants(found.get("variants")),
            layers=layers,
            sparsity=sparsity,
            operations=operations,
            methods=methods if "merge" in operations else (),
            lambdas=self.range(merge.get("scale", [0.0, 1.5]), "merge.scale", -10.0, 10.0),
            densities=self.range(merge.get("density", [0.1, 0.9]), "merge.density", 0.01, 0.99),
            shares=self.range(concat.get("share", [0.1, 0.9]), "concat.share", 0.01, 0.99),
            scales=scales,
            separate=parts == "separate",
            groups=self.values.integer(fusion["groups"], "fusion.groups", 1, 10_000) if "groups" in fusion else None,
            objectives=self.objectives(found["objectives"]) if "objectives" in found else (),
            search=self.search(self.section(found, "search", tuple(SearchSpec.__dataclass_fields__))),
            heal=heal,
        )

    def section(self, found: dict[str, Any], key: str, keys: tuple[str, ...]) -> dict[str, Any]:
        return self.values.mapping(found[key], key, keys) if key in found else {}

    def needs(self, found: dict[str, Any], key: str, operations: tuple[Operation, ...]) -> None:
        if key in found and key not in operations:
            self.values.wrong(
                key, f"{key!r} among the operations, for it has settings", "it is not", "Add or remove it."
            )

    def words(self, value: Any, path: str, kind: Any, known: Any = None) -> tuple[Any, ...]:
        """A list of known words, each once."""
        known = tuple(known or get_args(kind))
        words = []
        for index, entry in enumerate(self.values.array(value, path, _MOST)):
            if not isinstance(entry, str) or entry not in known:
                self.values.wrong(f"{path}[{index}]", f"one of {', '.join(known)}", shown(entry))
            elif entry in words:
                self.values.wrong(f"{path}[{index}]", "each once", f"{entry} a second time")
            else:
                words.append(entry)
        return tuple(words)

    def range(self, value: Any, path: str, least: float, most: float) -> Range:
        """Two numbers, the lower first; or one number."""
        ends = value if isinstance(value, list) else [value, value]
        numbers = [end for end in ends if isinstance(end, (int, float)) and not isinstance(end, bool)]
        fits = len(ends) == 2 and len(numbers) == 2 and least <= numbers[0] <= numbers[1] <= most
        if not fits:
            self.values.wrong(path, f"[lowest, highest], both from {least:g} to {most:g}", _listed(value))
            return (1.0, 1.0)
        return float(numbers[0]), float(numbers[1])

    def member(self, name: str, value: Any, path: str) -> MemberSpec:
        if isinstance(value, str):
            return MemberSpec(name=name, model=self.values.text(value, path))
        entry = self.values.mapping(value, path, ("model", "revision"), ("model",))
        revision = entry.get("revision")
        return MemberSpec(
            name=name,
            model=self.values.text(entry.get("model"), f"{path}.model") if "model" in entry else "?",
            revision=None if revision is None else self.values.text(revision, f"{path}.revision"),
        )

    def variants(self, value: Any) -> tuple[MemberSpec, ...]:
        if value is None:
            return ()
        if not isinstance(value, dict):
            self.values.wrong("variants", "a mapping from names to models", shown(value))
            return ()
        found = []
        for name, entry in value.items():
            path = f"variants.{name}" if isinstance(name, str) else f"variants.{shown(name)}"
            if not isinstance(name, str) or not VARIANT_NAME.fullmatch(name) or name == BASE:
                expected = "a name of at most 64 letters, digits, '_', '-' and '.' (not 'base')"
                self.values.wrong(path, expected, shown(name), "Rename it.")
            found.append(self.member(str(name), entry, path))
        return tuple(found)

    def target(self, value: Any) -> tuple[int | None, float | None]:
        found = self.values.mapping(value, "target", ("layers", "sparsity"))
        if len(found) != 1:
            self.values.wrong("target", "either layers or sparsity", "both" if found else "neither")
        layers = self.values.integer(found["layers"], "target.layers", 1, 10_000) if "layers" in found else None
        sparsity = None
        if "sparsity" in found:
            sparsity = self.values.number(found["sparsity"], "target.sparsity")
            if not 0.0 < sparsity < 1.0 and not math.isnan(sparsity):
                self.values.wrong("target.sparsity", "a share of the layers between 0 and 1", shown(sparsity))
        return layers, sparsity

    def objectives(self, value: Any) -> tuple[ObjectiveSpec, ...]:
        found: list[ObjectiveSpec] = []
        for index, entry in enumerate(self.values.array(value, "objectives", _MOST)):
            path = f"objectives[{index}]"
            entry = self.values.mapping(entry, path, ("name", "task", "loss", "kl", "split", "metric"), ("name",))
            name = self.values.text(entry.get("name"), f"{path}.name") if "name" in entry else "?"
            if name != "?" and name in [other.name for other in found]:
                self.values.wrong(f"{path}.name", "a name of its own", shown(name), "Rename it.")
            kinds: list[Literal["task", "loss", "kl"]] = [kind for kind in ("task", "loss", "kl") if kind in entry]
            if len(kinds) != 1:
                self.values.wrong(path, "exactly one of task, loss and kl", ", ".join(kinds) or "none")
            metric = entry.get("metric", "likelihood")
            if metric not in get_args(Metric):
                self.values.wrong(f"{path}.metric", " or ".join(get_args(Metric)), shown(metric))
            elif "metric" in entry and kinds != ["task"]:
                self.values.wrong(f"{path}.metric", "a metric only for a task", shown(metric), "Remove it.")
            kind: Literal["task", "loss", "kl"] = kinds[0] if kinds else "task"
            source = self.values.text(entry[kind], f"{path}.{kind}") if kinds else "?"
            split = self.split(entry["split"], f"{path}.split") if "split" in entry else (0.0, 1.0)
            found.append(ObjectiveSpec(name=name, kind=kind, source=source, split=split, metric=metric))
        return tuple(found)

    def split(self, value: Any, path: str) -> Range:
        """`0:0.33`, the first third."""
        first, colon, last = value.partition(":") if isinstance(value, str) else ("", "", "")
        try:
            ends = (float(first or 0.0), float(last or 1.0))
        except ValueError:
            ends = (1.0, 0.0)
        if not colon or not 0.0 <= ends[0] < ends[1] <= 1.0:
            self.values.wrong(path, "a part of the file such as 0:0.33, in quotes", shown(value))
            return (0.0, 1.0)
        return ends

    def search(self, found: dict[str, Any]) -> SearchSpec:
        usual = SearchSpec()
        engine = found.get("engine", usual.engine)
        if engine not in get_args(Engine):
            self.values.wrong("search.engine", " or ".join(get_args(Engine)), shown(engine))
        numbers = {"trials": 1, "min_budget": 1, "max_budget": 1, "eta": 2, "seed": 0}
        given = {
            key: self.values.integer(found[key], f"search.{key}", least) if key in found else getattr(usual, key)
            for key, least in numbers.items()
        }
        if given["min_budget"] > given["max_budget"]:
            found_text = f"{given['min_budget']} and {given['max_budget']}"
            self.values.wrong("search.min_budget", "at most max_budget", found_text)
        starts = found.get("warm_start", list(usual.warm_start))
        starts = self.values.array(starts, "search.warm_start", _MOST) if starts != [] else []
        for index, start in enumerate(starts):
            if not isinstance(start, str) or not (start in (RANDOM_MIDDLE, *planners.names) or Path(start).exists()):
                expected = f"{RANDOM_MIDDLE}, {', '.join(planners.names)}, or an earlier run's folder"
                self.values.wrong(f"search.warm_start[{index}]", expected, shown(start))
        return SearchSpec(engine=engine, warm_start=tuple(str(start) for start in starts), **given)


def _listed(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, list) else shown(value)
