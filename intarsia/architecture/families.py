"""Families of models as data: the TOML files of the package, and one of the user's.

docs/ADD_A_FAMILY.md explains the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, PlainValidator, PrivateAttr, model_validator

from intarsia.data_file import Misplaced, Strict, checked, raise_misplaced, read_toml, unexpected
from intarsia.disk import damage_named

Part: TypeAlias = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")

_NEEDED_FIELDS = ("layers", "width", "query_heads", "channels", "vocabulary", "tied")
_OTHER_FIELDS = ("kv_heads", "head_dim", "experts", "residual_scale", "embedding_width")
_Texts: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]
_Count: TypeAlias = Annotated[int, Field(gt=0)]


def _flag(value: Any) -> bool | str:
    if isinstance(value, (bool, str)):
        return value
    raise unexpected("true, false, or the name of a config field")


def _size(value: Any) -> int | str:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise unexpected("a positive whole number, or the name of a config field")


def _fields(value: dict[str, str]) -> dict[str, str]:
    known = (*_NEEDED_FIELDS, *_OTHER_FIELDS)
    wrong: list[Misplaced] = [
        ((name,), unexpected("a field of the config", remedy="Add it."), None)
        for name in _NEEDED_FIELDS
        if name not in value
    ]
    for name in value:
        if name not in known:
            wrong.append(((name,), unexpected(f"one of {', '.join(known)}", "an unknown key"), None))
    raise_misplaced(wrong)
    return value


Flag: TypeAlias = Annotated[bool | str, PlainValidator(_flag)]
"""A truth value, or the config field that holds it."""
Size: TypeAlias = Annotated[int | str, PlainValidator(_size)]
"""A positive whole number, or the config field that holds it."""


class PerLayer(Strict):
    """A config field with one entry per layer."""

    field: str
    # The meaning of a missing field: each `every`-th layer is `nth`, the others are `others`. None: there is no such
    # list.
    every: Size | None = None
    nth: Any = None
    others: Any = None
    # The kind of a layer with each value; layers of different kinds are not joined.
    kinds: dict[str, str] | None = None
    # Fields from which a runtime derives the list; they are kept only if that gives the same list.
    instead_of: _Texts = ()


class Stacked(Strict):
    """A parameter in memory with the matrices of all experts, `[experts, ...]`; each joins its `tensors` by rows."""

    parameter: str
    tensors: _Texts


class LinearEntry(Strict):
    """A linear layer, as `intarsia.architecture.spec.Linear` before the config is known."""

    module: str
    part: Part
    side: Literal["reads", "writes"]
    segments: Annotated[tuple[Literal["q", "kv", "qkv", "channel", "expert"], ...], Field(strict=False)]
    bias: Flag = False
    per_expert: bool = False
    whole: Size | None = None


class NormEntry(Strict):
    """A norm, as `intarsia.architecture.spec.Norm` before the config is known."""

    module: str
    part: Part
    place: Literal["before", "inside", "after"]
    serves: Annotated[tuple[Part, ...], Field(strict=False)] = ()
    rows: Literal["q", "kv", "head", "kv_head"] | None = None
    offset: float = 0.0
    weight: Flag = True
    bias: Flag = False


class Refusal(Strict):
    """A kind of model that the file does not cover: all of `when` hold, not all of `when_not`, `unless` is missing."""

    feature: str
    remedy: str
    when: dict[str, Any] = Field(default_factory=dict)
    when_not: dict[str, Any] | None = None
    unless: str | None = None


class Approximation(Strict):
    """What is not exact in models with these config values."""

    when: dict[str, Any]
    text: str


class Modules(Strict):
    """The names of modules, in files."""

    layers: str
    embedding: str
    head: str
    # The head's module in memory, if its name in files differs.
    head_in_memory: str | None = None
    # The module in memory that runs the experts of a mixture.
    experts: str = ""


class Constants(Strict):
    """Numbers that are the same in every model of the family."""

    kv_heads: _Count | None = None
    channels_per_width: _Count | None = None


class Family(Strict):
    """One model family, as its TOML file describes it."""

    title: str
    model_types: _Texts
    # Config values that distinguish several layouts of one model type.
    when: dict[str, Any] = Field(default_factory=dict)
    modules: Modules
    # The config's fields for `layers`, `width`, `query_heads`, ...
    fields: Annotated[dict[str, str], AfterValidator(_fields)]
    constants: Constants = Constants()
    # The defaults of transformers for missing fields.
    defaults: dict[str, Any] = Field(default_factory=dict)
    # Aliases of fields, with the names in this file.
    aliases: dict[str, str] = Field(default_factory=dict)
    linears: list[LinearEntry] = Field(alias="linear")
    norms: list[NormEntry] = Field(alias="norm")
    # Whether attention and MLP read the same residual stream.
    parallel: Flag = False
    # Prefixes of names inside a layer in files, with those in memory.
    renamed: dict[str, str] = Field(default_factory=dict)
    stacked: list[Stacked] = Field(default_factory=list)
    # Layer tensors of older files that follow from the config, and are dropped.
    buffers: _Texts = ()
    # Whether `transformers` caches a key and a value of every query head, not of every KV group.
    caches_query_heads: bool = False
    # Config values of a small model of the family, besides smaller sizes (`intarsia.inspection.small`).
    tiny: dict[str, Any] = Field(default_factory=dict)
    refusals: list[Refusal] = Field(default_factory=list, alias="refuse")
    plain_lists: _Texts = Field(default=(), alias="per_layer_fields")
    lists: list[PerLayer] = Field(default_factory=list, alias="per_layer")
    always: _Texts = Field(alias="approximations")
    sometimes: list[Approximation] = Field(default_factory=list, alias="approximation")

    _name: str = PrivateAttr(default="")

    @model_validator(mode="after")
    def _one_writer_a_part(self) -> Family:
        wrong: list[Misplaced] = []
        for part in PARTS:
            found = [e.module for e in self.linears if (e.part, e.side, e.whole) == (part, "writes", None)]
            if len(found) != 1:
                error = unexpected(f"one that writes for the part {part!r}", ", ".join(found) or "none")
                wrong.append((("linear",), error, None))
        raise_misplaced(wrong)
        return self

    @property
    def name(self) -> str:
        return self._name

    @property
    def head_in_memory(self) -> str:
        """The head's module, in memory."""
        return self.modules.head_in_memory or self.modules.head

    @property
    def per_layer(self) -> tuple[PerLayer, ...]:
        """The config fields with one entry per layer."""
        return (*(PerLayer(field=field) for field in self.plain_lists), *self.lists)

    @property
    def approximations(self) -> tuple[str, ...]:
        """The approximations in any of its models."""
        found = list(self.always)
        for entry in self.sometimes:
            when = " and ".join(f"{key} is {str(value).lower()}" for key, value in entry.when.items())
            found.append(f"{entry.text} (where {when})")
        return tuple(found)


class Rules(Strict):
    """`per_layer.toml`: how config fields follow the layers, by name."""

    indices: _Texts
    leading: _Texts
    trailing: _Texts
    patterns: _Texts
    maps: _Texts
    periods: list[_Texts]
    steps: list[_Texts]
    repeats: list[_Texts]
    roots: _Texts
    written_out: _Texts
    others: _Texts

    @property
    def follow(self) -> set[str]:
        """The fields that can be adapted to any layers."""
        own = (self.indices, self.leading, self.trailing, self.patterns, self.maps, self.roots)
        lists = [*own, *self.periods, *self.steps, *(each[:1] for each in self.repeats)]
        return {name for names in lists for name in names}

    @property
    def names(self) -> set[str]:
        return {*self.follow, *self.written_out, *self.others}


_tried: dict[str, Family] = {}


def known_families() -> dict[str, Family]:
    """All known families by name, the user's first."""
    return {**_tried, **{name: family for name, family in _packaged().items() if name not in _tried}}


@contextmanager
def with_family_file(path: Path | None) -> Iterator[None]:
    """Within the context, also know the family of a file; None adds nothing.

    Raises:
        UserError: it is not a family file; with every problem.
    """
    if path is None:
        yield
        return
    expected = "a family file in TOML (docs/ADD_A_FAMILY.md)"
    remedy = "Copy one of intarsia/architecture/families/ and change it."
    with damage_named(path, expected=expected, remedy=remedy):
        data = read_toml(path)
    _tried[path.stem] = _family(path.stem, data, where=str(path))
    try:
        yield
    finally:
        del _tried[path.stem]


@cache
def uncovered() -> dict[str, dict[str, str]]:
    """Model types that cannot be described yet, with the unsupported feature and a remedy."""
    entries = read_toml(files("intarsia.architecture") / "uncovered.toml")["family"]
    return {kind: entry for entry in entries for kind in entry["model_types"]}


@cache
def rules() -> Rules:
    """The rules for fields that several families share."""
    data = read_toml(files("intarsia.architecture") / "per_layer.toml")
    return checked(Rules, data, where="per_layer.toml", remedy="See its comments.")


@cache
def _packaged() -> dict[str, Family]:
    folder = files("intarsia.architecture") / "families"
    entries = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda e: e.name)
    return {name: _family(name, read_toml(entry), where=entry.name) for entry in entries if (name := entry.name[:-5])}


def _family(name: str, data: Mapping[str, Any], *, where: str) -> Family:
    family = checked(Family, data, where=where, remedy="See docs/ADD_A_FAMILY.md.")
    family._name = name
    return family
