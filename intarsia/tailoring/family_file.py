"""family.yaml: a family of models, and what to search for.

Its paths are relative to the working directory, as on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from intarsia import registry
from intarsia.data_file import Strict, Text, checked, dump_yaml, raise_misplaced, read_yaml, unexpected
from intarsia.errors import UserError
from intarsia.flags import plain
from intarsia.recipe.methods import METHODS
from intarsia.recipe.recipe import VARIANT_NAME

BASE = "base"
RANDOM_MIDDLE = "random-middle"
_MOST = 100
_REMEDY = "Correct the file."

Range: TypeAlias = tuple[float, float]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _range(least: float, most: float) -> PlainValidator:
    """A validator for a range: two ascending numbers, or one."""

    def read(value: Any) -> Range:
        limits = list(value) if isinstance(value, list | tuple) else [value, value]
        numbers = [each for each in limits if isinstance(each, int | float) and not isinstance(each, bool)]
        if not (len(limits) == len(numbers) == 2 and least <= numbers[0] <= numbers[1] <= most):
            raise unexpected(f"[lowest, highest], both from {least:g} to {most:g}", repr(value)[:60])
        return float(numbers[0]), float(numbers[1])

    return PlainValidator(read)


def _split(value: Any) -> Range:
    """`0:0.33`, the first third."""
    if isinstance(value, tuple):  # from Python, not from a file
        value = f"{value[0]}:{value[1]}"
    first, colon, last = value.partition(":") if isinstance(value, str) else ("", "", "")
    try:
        found = (float(first or 0.0), float(last or 1.0))
    except ValueError:
        found = (1.0, 0.0)
    if not colon or not 0.0 <= found[0] < found[1] <= 1.0:
        raise unexpected("a part of the file such as 0:0.33, in quotes")
    return found


def _known(words: Callable[[], Iterable[str]]) -> AfterValidator:
    """A validator for a list of known words, each once."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        known = tuple(words())
        wrong = []
        for index, word in enumerate(value):
            if word not in known:
                wrong.append(((index,), unexpected(f"one of {', '.join(known)}"), word))
            elif word in value[:index]:
                wrong.append(((index,), unexpected("each once", f"{word} a second time"), word))
        raise_misplaced(wrong)
        return value

    return AfterValidator(check)


def _variant_name(name: Any) -> str:
    if not isinstance(name, str) or not VARIANT_NAME.fullmatch(name) or name == BASE:
        expected = "a name of at most 64 letters, digits, '_', '-' and '.' (not 'base')"
        raise unexpected(expected, remedy="Rename it.")
    return name


Split: TypeAlias = Annotated[
    Range, PlainValidator(_split), PlainSerializer(lambda split: f"{split[0]:.15g}:{split[1]:.15g}")
]
_Words: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=_MOST)]
_Count: TypeAlias = Annotated[int, Field(ge=1, le=10_000)]
_Number: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]


class MemberSpec(Strict):
    """A model of the family, by the user's name for it."""

    model: Text
    revision: Text | None = None


def _member(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


_Member: TypeAlias = Annotated[MemberSpec, BeforeValidator(_member)]


class TargetSpec(Strict):
    """The size of the result: a depth, or a share of the base's parameters to remove."""

    layers: _Count | None = None
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> TargetSpec:
        given = [name for name in ("layers", "sparsity") if getattr(self, name) is not None]
        if len(given) != 1:
            raise unexpected("either layers or sparsity", "both" if given else "neither", "Give one of them.")
        return self


class MergeSpec(Strict):
    """How layers are merged."""

    # Merge operators to choose from.
    methods: Annotated[_Words, _known(lambda: METHODS)] = ("linear", "slerp", "task_arithmetic", "ties")
    # How much of a difference to the base a merge adds; None for the operators' own ranges.
    scale: Annotated[Range, _range(-10.0, 10.0)] | None = None
    # How much of a difference is kept; None for the operators' own ranges.
    density: Annotated[Range, _range(0.01, 0.99)] | None = None
    # Whether attention and MLP of a layer are merged in the same way.
    parts: Literal["together", "separate"] = "together"


class ConcatSpec(Strict):
    """How adjacent layers are joined."""

    # The first layer's share of the pieces.
    share: Annotated[Range, _range(0.01, 0.99)] = (0.1, 0.9)


class FusionSpec(Strict):
    """How layers are merged at full depth."""

    # Number of groups of adjacent layers that share a merge; None for single layers.
    groups: _Count | None = None


class ObjectiveSpec(Strict):
    """One objective: exactly one of `task`, `loss` and `kl`."""

    name: Text
    # A task of lm-eval, or a JSONL file of questions.
    task: Text | None = None
    # A text, or a JSONL file with queries and targets: the loss on it.
    loss: Text | None = None
    # A text: the KL divergence from the base on it.
    kl: Text | None = None
    # The part of the file that the search uses.
    split: Split = (0.0, 1.0)
    # The metric of a task.
    metric: Literal["accuracy", "margin", "likelihood"] = "likelihood"

    @model_validator(mode="after")
    def _one(self) -> ObjectiveSpec:
        kinds = [kind for kind in ("task", "loss", "kl") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise unexpected("exactly one of task, loss and kl", ", ".join(kinds) or "none", "Give one of them.")
        if "metric" in self.model_fields_set and kinds != ["task"]:
            raise unexpected("a metric only for a task", self.metric, "Remove it.")
        return self

    @property
    def kind(self) -> Literal["task", "loss", "kl"]:
        """The kind of objective."""
        return "task" if self.task is not None else "loss" if self.loss is not None else "kl"

    @property
    def source(self) -> str:
        """The task or file."""
        return str(getattr(self, self.kind))


class SearchSpec(Strict):
    """How to search. Budgets are numbers of examples of each objective. docs/TAILOR.md explains the defaults."""

    # The engine, with options as in `smac[challengers=100]`.
    engine: str = "evolve"
    trials: _Number = 120
    min_budget: _Number = 16
    max_budget: _Number = 256
    # One of N candidates at a budget is promoted to the next.
    eta: Annotated[int, Field(ge=2, le=2**31 - 1)] = 3
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    # First candidates: `random-middle`, planners, folders of earlier runs.
    warm_start: Annotated[tuple[str, ...], BeforeValidator(_tuple), Field(max_length=_MOST)] = (RANDOM_MIDDLE,)

    @field_validator("engine", mode="before")
    @classmethod
    def _known_engine(cls, value: Any) -> Any:
        try:
            return registry.engines.choose(value if isinstance(value, str) else "").label
        except UserError as error:
            known = ", ".join(registry.engines.names)
            remedy = " ".join(str(problem) for problem in error.problems)
            raise unexpected(f"one of {known}", remedy=remedy if isinstance(value, str) else "") from None

    @field_validator("warm_start")
    @classmethod
    def _known_starts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        expected = f"{RANDOM_MIDDLE}, {', '.join(registry.planners.names)}, or an earlier run's folder"
        known = (RANDOM_MIDDLE, *registry.planners.names)
        raise_misplaced(
            [
                ((index,), unexpected(expected), start)
                for index, start in enumerate(value)
                if start not in known and not Path(start).exists()
            ]
        )
        return value

    @model_validator(mode="after")
    def _ascending(self) -> SearchSpec:
        if self.min_budget > self.max_budget:
            found = f"{self.min_budget} and {self.max_budget}"
            raise_misplaced([(("min_budget",), unexpected("at most max_budget", found), self.min_budget)])
        return self


class FamilyFile(Strict):
    """The content of a family.yaml."""

    base: _Member
    variants: Annotated[
        dict[Annotated[str, PlainValidator(_variant_name)], _Member],
        BeforeValidator(lambda value: {} if value is None else value),
    ] = {}  # noqa: RUF012  (pydantic copies it)
    target: TargetSpec
    operations: Annotated[_Words, _known(lambda: ("remove", "select", "merge", "concat", "half-layers", "stack"))] = (
        "remove",
        "select",
        "merge",
    )
    merge: MergeSpec = MergeSpec()
    concat: ConcatSpec = ConcatSpec()
    # Range of the factor on a kept layer's output.
    output_scale: Annotated[Range, _range(0.0, 10.0)] = (1.0, 1.0)
    fusion: FusionSpec = FusionSpec()
    objectives: Annotated[tuple[ObjectiveSpec, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=_MOST)]
    search: SearchSpec = SearchSpec()
    # Trials to heal in closed form before scoring: none, those at the greatest budget, or all.
    heal: Literal["none", "finalists", "every"] = "none"

    @field_validator("output_scale")
    @classmethod
    def _around_one(cls, value: Range) -> Range:
        if not value[0] <= 1.0 <= value[1]:
            raise unexpected("a range that contains 1, the unscaled layer")
        return value

    @field_validator("objectives")
    @classmethod
    def _own_names(cls, value: tuple[ObjectiveSpec, ...]) -> tuple[ObjectiveSpec, ...]:
        names = [each.name for each in value]
        wrong = [index for index, name in enumerate(names) if name in names[:index]]
        error = unexpected("a unique name", remedy="Rename it.")
        raise_misplaced([((index, "name"), error, names[index]) for index in wrong])
        return value

    @model_validator(mode="after")
    def _used(self) -> FamilyFile:
        raise_misplaced(
            [
                (
                    (key,),
                    unexpected(f"{key!r} among the operations", "it is not", "Add it, or remove its settings."),
                    "",
                )
                for key in ("merge", "concat")
                if key in self.model_fields_set and key not in self.operations
            ]
        )
        return self

    @property
    def members(self) -> dict[str, MemberSpec]:
        """The models by name, the base first."""
        return {BASE: self.base, **self.variants}

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge operators to choose from."""
        return self.merge.methods if "merge" in self.operations else ()

    @property
    def engine(self) -> registry.Chosen:
        """The engine with its settings."""
        chosen: registry.Chosen = registry.engines.choose(self.search.engine)
        return chosen

    def heals(self, budget: int) -> bool:
        """Whether a trial at this budget is healed before it is scored."""
        return self.heal == "every" or (self.heal == "finalists" and budget >= self.search.max_budget)

    def absolute(self) -> FamilyFile:
        """The same with absolute paths; names that are not files are unchanged."""
        from intarsia.evaluation.task_file import names_a_file

        def member(spec: MemberSpec) -> MemberSpec:
            return spec.model_copy(update={"model": absolute_path(spec.model)})

        def objective(spec: ObjectiveSpec) -> ObjectiveSpec:
            # A task of lm-eval keeps its name, even if a folder has the same one.
            named = spec.kind == "task" and not names_a_file(spec.source)
            return spec if named else spec.model_copy(update={spec.kind: absolute_path(spec.source)})

        known = (RANDOM_MIDDLE, *registry.planners.names)
        starts = tuple(name if name in known else absolute_path(name) for name in self.search.warm_start)
        return self.model_copy(
            update={
                "base": member(self.base),
                "variants": {name: member(spec) for name, spec in self.variants.items()},
                "objectives": tuple(map(objective, self.objectives)),
                "search": self.search.model_copy(update={"warm_start": starts}),
            }
        )

    def to_yaml(self) -> str:
        """The family file as YAML."""
        return dump_yaml(plain(self.model_dump(exclude_unset=True)))


def absolute_path(name: str) -> str:
    """The absolute path of an existing file or folder, with its `#part`; other names are unchanged."""
    from intarsia.model_name import DEMO

    if name == DEMO:
        return name
    whole = Path(name).expanduser()
    if whole.exists():
        return str(whole.resolve())
    file, mark, part = name.partition("#")
    path = Path(file).expanduser()
    return f"{path.resolve()}{mark}{part}" if mark and path.exists() else name


def read_family_file(path: Path) -> FamilyFile:
    """Read a family.yaml and check its form; `open_family` checks that the models belong together.

    Raises:
        UserError: with every problem in it.
    """
    return parse_family(read_yaml(path, what="a family"), where=str(path))


def parse_family(data: Any, *, where: str) -> FamilyFile:
    """The family that plain data describes.

    Raises:
        UserError: with every problem in it.
    """
    return checked(FamilyFile, data, where=where, remedy=_REMEDY)
