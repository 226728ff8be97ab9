"""What a family's TOML file says besides the linear layers and norms of a layer, which `intarsia.anatomy.spec` has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PerLayer:
    """A config field with one entry a layer.

    `every`: what a config that lacks the field means: each `every`-th layer is `nth`, every other one `others`. None:
    it then says nothing layer by layer.
    `kinds`: what a layer with that value is; layers of different kinds are not joined.
    `instead_of`: fields from which a runtime would make the list anew; they stay only where that gives the same list.
    """

    field: str
    every: int | str | None = None
    nth: Any = None
    others: Any = None
    kinds: Mapping[str, str] | None = None
    instead_of: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A parameter in memory that holds a matrix of every expert: `[experts, ...]`, `tensors` of each joined by rows."""

    parameter: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family, as read from its TOML file. `approximations`: what is not exact in any of its models.

    `head_in_memory`: the head's module in memory, where files call it otherwise.
    `renamed`: how a name inside a layer begins in files, and how it begins in memory.
    `experts_module`: the module in memory that runs the experts of a mixture.
    `buffers`: layer tensors of older files that are computed from the config, and left out.
    `caches_query_heads`: `transformers` keeps a key and a value of every query head, not of every KV group.
    `tiny`: what a small model of the family needs in its config beside smaller sizes (`intarsia.building.shrunken`).
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    layers_module: str
    embedding_module: str
    head_module: str
    fields: Mapping[str, str]
    per_layer: tuple[PerLayer, ...]
    approximations: tuple[str, ...]
    head_in_memory: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[Stacked, ...] = ()
    experts_module: str = ""
    buffers: tuple[str, ...] = ()
    caches_query_heads: bool = False
    tiny: Mapping[str, Any] = field(default_factory=dict)
