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
VARIANT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # What may stand before the colon in `math:4`.
Span = tuple[int, int]
Fitted = Mapping[int, Mapping[str, npt.NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True, order=True)
class LayerRef:
    """Layer `layer` (from 0) of the variant called `variant`."""

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
    # How much this cut counts, part by part, in the parameters that belong to no piece: the biases of o_proj and
    # down_proj, QK-norm weights and, with norm mode `average`, the norms. They sum to 1 over the cuts of a `Concat`.
    weights: Mapping[Part, float] = field(hash=False)

    def pieces(self, part: Part) -> tuple[int, ...]:
        """Indices of this cut's pieces of one part."""
        return self.kv_groups if part == "attention" else self.channels


@dataclass(frozen=True, kw_only=True)
class Concat:
    """Pieces of several layers joined into one layer of the family's own shape."""

    cuts: tuple[Cut, ...]
    # `fold` puts each source's norm parameters into the rows that read them, so that every piece sees the input it was
    # trained on; `average` takes the weighted average of the norms, as in arXiv 2510.15304.
    norm: NormMode = "fold"
    # Whether the pieces that are left out are added, scaled, onto the most similar ones that are kept.
    fuse: bool = False

    @property
    def sources(self) -> tuple[LayerRef, ...]:
        return tuple(cut.source for cut in self.cuts)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the tensors of several layers are combined; `intarsia.recipe.methods` has what each method takes."""

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
    # The layer, at the index of the sources, to which methods on differences (task arithmetic and its kin) take them,
    # and to which they add the result.
    base: LayerRef | None = None
    # Multiplies what both parts write to the residual stream (the weights and biases of o_proj and down_proj).
    scale: float = 1.0
    # How the tensors of the MLP and of its norm are combined, where that differs from the attention's.
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
    """The layers that some ops are made of, as a person names them: `base:4, base:5`."""
    return ", ".join(str(source) for op in ops for source in op.sources)


def parse_ranges(text: str, *, most: int) -> tuple[int, ...]:
    """The indices that a text names, in its order; an empty text names none.

    Raises:
        ValueError: the text is something else, a range runs backwards, or it names more than `most` indices.
    """
    found: list[int] = []
    for run in text.split(",") if text.strip() else ():
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"{run.strip()[:40]!r} is neither a number nor a range")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first or last > MAX_INDEX:
            raise ValueError(f"the range {run.strip()[:40]!r} does not run upwards within 0..{MAX_INDEX}")
        if len(found) + last - first + 1 > most:
            raise ValueError(f"more than {most} indices")
        found.extend(range(first, last + 1))
    return tuple(found)


def format_ranges(indices: Iterable[int]) -> str:
    """The text for `parse_ranges` that names these indices in this order."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


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
