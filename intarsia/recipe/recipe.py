"""The recipe: everything that decides the weights of an output model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from intarsia.recipe.ops import LayerRef, Op, Select

SCHEMA_VERSION = 1
VARIANT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # What may stand before the colon in `math:4`.

Span = tuple[int, int]
Fitted = Mapping[int, Mapping[str, npt.NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One member of a family of models: where it is, and the hash of its weights."""

    name: str
    # A local folder, a hub id or `demo`.
    model: str
    # Of a hub id.
    revision: str | None = None
    # None in a recipe by hand.
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An output model, layer by layer."""

    variants: tuple[Variant, ...]
    # The variant that gives everything outside the layers (embeddings, final norm, config, tokenizer).
    base: str
    # The base's number of layers.
    depth: int
    # One op for each output layer.
    layers: tuple[Op, ...]
    # (a, b): the output layer stands for the original layers a .. b-1. The spans tile 0 .. depth.
    spans: tuple[Span, ...]
    # Tensors of output layers that replace what the op gives (float32, cast to the checkpoint's dtype on build).
    fitted: Fitted = field(default_factory=dict)
    # How the recipe was made; it decides nothing.
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def with_layers(self, layers: Sequence[Op], **changes: Any) -> Recipe:
        """The same recipe with other layers, their spans derived, and no fitted tensors."""
        return replace(self, layers=tuple(layers), spans=derive_spans(layers, self.depth), **{"fitted": {}, **changes})


def identity(variant: Variant, depth: int) -> Recipe:
    """The recipe that reproduces a model of `depth` layers bit for bit."""
    layers = tuple(Select(source=LayerRef(variant=variant.name, layer=layer)) for layer in range(depth))
    return Recipe(variants=(variant,), base=variant.name, depth=depth, layers=layers, spans=derive_spans(layers, depth))


def derive_spans(layers: Sequence[Op], depth: int) -> tuple[Span, ...]:
    """Spans from the ops alone: an output layer stands for its sources and the removed layers after them.

    Layers removed before the first source belong to the first output layer. Where sources are not in order (a
    stack deeper than the base, say), a span may be empty.
    """
    starts: list[int] = []
    for op in layers:
        first = min(source.layer for source in op.sources)
        starts.append(min(max(first, starts[-1]), depth) if starts else 0)
    return tuple(zip(starts, [*starts[1:], depth], strict=True))
