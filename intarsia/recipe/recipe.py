"""The recipe: everything that decides the weights of an output model.

An output layer is one of three ops. `Select`: one layer of one variant, whole. `Merge`: whole layers combined by weight
arithmetic. `Concat`: pieces of several layers joined into one. A layer that no op mentions is dropped. A layer with a
scaled output is a `Merge` too, so that a `Select` is always the source's own bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from intarsia.architecture.spec import Part
from intarsia.data_file import MAX_INDEX

NormMode = Literal["fold", "average"]
MergeMethod: TypeAlias = str
"""The name of a registered merge operator."""
_RUN = re.compile(r"\s*([0-9]{1,10})\s*(?:-\s*([0-9]{1,10})\s*)?", re.ASCII)
SCHEMA_VERSION = 1
VARIANT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # The text before the colon in `math:4`.
Span = tuple[int, int]
Fitted = Mapping[int, Mapping[str, npt.NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True, order=True)
class LayerRef:
    """Layer `layer` (from 0) of the variant `variant`."""

    variant: str
    layer: int

    def __str__(self) -> str:
        return f"{self.variant}:{self.layer}"


@dataclass(frozen=True, kw_only=True)
class Select:
    """One whole layer."""

    source: LayerRef

    @property
    def sources(self) -> tuple[LayerRef, ...]:
        return (self.source,)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Pieces of one layer, in their new order."""

    source: LayerRef
    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]
    # The weight of this cut, by part, in the parameters that belong to no piece: the biases of o_proj and down_proj,
    # QK-norm weights and, with norm mode `average`, the norms. Weights sum to 1 over the cuts of a `Concat`.
    weights: Mapping[Part, float] = field(hash=False)

    def pieces(self, part: Part) -> tuple[int, ...]:
        """Indices of this cut's pieces of one part."""
        return self.kv_groups if part == "attention" else self.channels


@dataclass(frozen=True, kw_only=True)
class Concat:
    """Pieces of several layers joined into one layer of the family's own shape."""

    cuts: tuple[Cut, ...]
    # `fold` folds each source's norm into the rows that read it, so that every piece sees the input it was trained on;
    # `average` takes the weighted average of the norms, as in arXiv 2510.15304.
    norm: NormMode = "fold"
    # Whether each discarded piece is added, scaled, to the most similar kept one.
    fuse: bool = False

    @property
    def sources(self) -> tuple[LayerRef, ...]:
        return tuple(cut.source for cut in self.cuts)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the tensors of several layers are combined; see `intarsia.recipe.methods` for the methods' parameters."""

    # One for each layer; 0 leaves the layer out.
    weights: tuple[float, ...]
    method: MergeMethod = "linear"
    params: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Whole layers combined tensor by tensor. `linear`: the sum of `weights[i]` times source i."""

    sources: tuple[LayerRef, ...]
    weights: tuple[float, ...]
    method: MergeMethod = "linear"
    params: Mapping[str, float] = field(default_factory=dict, hash=False)
    # The base layer of methods on differences (such as task arithmetic), at the index of the sources.
    base: LayerRef | None = None
    # Factor on the outputs of both parts (the weights and biases of o_proj and down_proj).
    scale: float = 1.0
    # How the tensors of the MLP and its norm are combined, if it differs from the attention.
    mlp: Mix | None = None

    def mix(self, part: Part) -> Mix:
        """How the tensors of a part are combined."""
        if part == "mlp" and self.mlp is not None:
            return self.mlp
        return Mix(weights=self.weights, method=self.method, params=self.params)

    @property
    def plain(self) -> bool:
        """Whether it is a weighted sum of layers and nothing else."""
        return self.method == "linear" and self.mlp is None and self.scale == 1.0


Op: TypeAlias = Select | Concat | Merge


def sources_of(ops: Iterable[Op]) -> str:
    """The source layers of some ops, in words: `base:4, base:5`."""
    return ", ".join(str(source) for op in ops for source in op.sources)


def parse_ranges(text: str, *, most: int) -> tuple[int, ...]:
    """The indices in a text, in its order; none in an empty text.

    Raises:
        ValueError: the text is malformed, a range runs backwards, or there are more than `most` indices.
    """
    found: list[int] = []
    for run in text.split(",") if text.strip() else ():
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"{run.strip()[:40]!r} is neither a number nor a range")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first or last > MAX_INDEX:
            raise ValueError(f"the range {run.strip()[:40]!r} does not ascend within 0..{MAX_INDEX}")
        if len(found) + last - first + 1 > most:
            raise ValueError(f"more than {most} indices")
        found.extend(range(first, last + 1))
    return tuple(found)


def format_ranges(indices: Iterable[int]) -> str:
    """The text that `parse_ranges` reads as these indices."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant: the location of a model, and the hash of its weights."""

    name: str
    # A local folder, a hub id or `demo`.
    model: str
    # Revision of a hub id.
    revision: str | None = None
    # None in a handwritten recipe.
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An output model, layer by layer."""

    variants: tuple[Variant, ...]
    # The variant of everything outside the layers (embeddings, final norm, config, tokenizer).
    base: str
    # The base's number of layers.
    depth: int
    # One op for each output layer.
    layers: tuple[Op, ...]
    # (a, b): the output layer replaces the original layers a .. b-1. The spans tile 0 .. depth.
    spans: tuple[Span, ...]
    # Tensors of output layers that replace those of the op (float32, cast to the checkpoint's dtype on build).
    fitted: Fitted = field(default_factory=dict)
    # How the recipe was made; it does not affect the model.
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def variant(self, name: str) -> Variant:
        """The variant with a name."""
        return next(variant for variant in self.variants if variant.name == name)

    def with_layers(self, layers: Sequence[Op], **changes: Any) -> Recipe:
        """The recipe with other layers, derived spans, and no fitted tensors."""
        return replace(self, layers=tuple(layers), spans=derive_spans(layers, self.depth), **{"fitted": {}, **changes})


def identity(variant: Variant, depth: int) -> Recipe:
    """The recipe that reproduces a model of `depth` layers bit for bit."""
    layers = tuple(Select(source=LayerRef(variant=variant.name, layer=layer)) for layer in range(depth))
    return Recipe(variants=(variant,), base=variant.name, depth=depth, layers=layers, spans=derive_spans(layers, depth))


def derive_spans(layers: Sequence[Op], depth: int) -> tuple[Span, ...]:
    """Derive spans from the ops: an output layer's span is its sources and the removed layers after them.

    Layers removed before the first source belong to the first output layer. If sources are not in order (as in a
    stack deeper than the base), a span may be empty.
    """
    starts: list[int] = []
    for op in layers:
        first = min(source.layer for source in op.sources)
        starts.append(min(max(first, starts[-1]), depth) if starts else 0)
    return tuple(zip(starts, [*starts[1:], depth], strict=True))
