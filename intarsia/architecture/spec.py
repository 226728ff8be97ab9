"""The pieces of a layer, and where its tensors hold them.

A *piece* is the smallest part that can move from one layer to another:

- a **KV group** of attention: one key/value head with all the query heads that read it (rows of q, k and v,
  columns of o). Under grouped-query attention query head `j` reads key/value head `j // heads_per_group`, so a
  group's query heads are consecutive rows.
- an **MLP channel**: one row of gate and up, one column of down.
- in a mixture, instead, an **expert**: all of its matrices, and its row of the router.

A linear layer that *reads* the residual stream holds its pieces as rows (axis 0 of a `[out, in]` weight, and the
entries of its bias); one that *writes* to it holds them as columns (axis 1), and its bias belongs to no piece.
Along that axis a tensor is a sequence of *segments*; a segment holds all pieces in order, `unit` rows each. Most layers
have one segment. A fused projection has several, or one in which each KV group has its query heads, then its key head,
then its value head (`qkv`).

Tensors have their names in files. A module in memory may have other names (`Family.renamed`), and hold those of all
experts in one parameter (`Family.stacked`).

Nothing here imports torch: an architecture is data about a `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from intarsia.architecture.families import PARTS, Family, Part

__all__ = ["PARTS", "Architecture", "Linear", "Norm", "Part"]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of one part."""

    module: str
    part: Part
    # Whether it reads the residual stream or writes to it.
    side: Literal["reads", "writes"]
    # Units along its cut axis: `q`, `kv`, `qkv`, `channel` or `expert` (see `Architecture.unit`).
    segments: tuple[str, ...]
    bias: bool
    # Whether each expert has one, with `{expert}` in its name; the whole matrix belongs to its piece.
    per_expert: bool = False
    # For a layer that belongs to no piece (a shared expert) and is averaged by weight in a joined layer: its inner
    # size.
    whole: int | None = None

    @property
    def cut_axis(self) -> int:
        """The axis of the `[out, in]` weight along which pieces lie."""
        return 0 if self.side == "reads" else 1


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of one part."""

    module: str
    part: Part
    # `before`: it makes the input of the part's reading layers, so its scale can be folded into them exactly.
    # `inside`: it acts after a projection (QK-norm); it cannot be folded.
    # `after`: it acts on what the part writes, before the residual sum; it cannot be folded.
    place: Literal["before", "inside", "after"]
    # The norm multiplies by `weight + offset`.
    offset: float
    weight: bool
    bias: bool
    # None: an inner norm has one head's weight for all heads. A kind of segment: it has an entry for every row of such
    # a segment, which belongs to the row's piece. `head` or `kv_head`: an entry is a head's whole weight.
    rows: str | None = None
    # The parts whose input it gives, if there are others than `part`; averages use the weights of `part`.
    serves: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that it acts on."""
        return self.serves or (self.part,)


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """Facts from a class of `transformers` without a family file, whose layers can only be removed."""

    # Why its layers cannot be joined.
    reason: str
    # Every tensor of each layer by its name inside the layer, with its shape.
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    # The structure of each layer; equal if one layer can take the place of the other.
    structures: tuple[str, ...]
    # The parameter that holds each tensor of a layer, by name inside the layer, and its first row there. Empty: the
    # files do not hold the parameters themselves.
    rows: Mapping[str, tuple[str, int]]
    # Parameters that are stacks of matrices, whose rows are those of the tensors: the number of matrices.
    stacks: Mapping[str, int]
    # Names in memory of tensors outside the layers.
    outside: Mapping[str, str]
    # Tensors outside the layers with an equal part for each layer, and the axis of these parts.
    tables: Mapping[str, int]
    # Linear modules whose scaled output is added to the residual stream, in the order of execution; None before they
    # are looked up.
    writers: Mapping[str, float] | None = None
    # The module in memory that holds the layers, and the embedding.
    layers_module: str
    embedding_module: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the layers of one model are made of: its family, with the numbers of its config."""

    family: Family
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    n_layers: int
    width: int
    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    # Channels of the MLP; of one expert if `n_experts` is not 0.
    n_channels: int
    vocabulary: int
    tied: bool
    # The attention type of each layer, if the config has any; only layers of one type are joined.
    layer_types: tuple[str, ...] | None
    config: Mapping[str, Any]
    # Per-layer lists of the config, explicit or by a rule.
    per_layer: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    n_experts: int = 0
    # Whether attention and MLP read the same residual stream, and both are added to it.
    parallel: bool = False
    # Factor on the output of a part before the residual sum.
    residual_scale: float = 1.0
    # Approximations when layers of this model are joined.
    approximations: tuple[str, ...] = ()
    # None: a family file describes the layers, and pieces of them can be joined.
    inspected: Inspected | None = None

    @property
    def removal_only(self) -> bool:
        """Whether layers can only be removed, not joined."""
        return self.inspected is not None

    @property
    def layers_in_memory(self) -> str:
        """The module in memory that holds the layers."""
        return self.inspected.layers_module if self.inspected else self.family.modules.layers

    @property
    def embedding_in_memory(self) -> str:
        """The embedding's module in memory."""
        return self.inspected.embedding_module if self.inspected else self.family.modules.embedding

    def in_memory(self, name: str) -> str:
        """The name in memory of a tensor outside the layers."""
        if self.inspected is not None:
            return self.inspected.outside.get(name, name)
        if name.startswith(f"{self.family.modules.head}."):
            return self.family.head_in_memory + name.removeprefix(self.family.modules.head)
        return name

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key/value head."""
        return self.n_query_heads // self.n_kv_heads

    def unit(self, segment: str) -> int:
        """Rows (or columns) of one piece in a segment of this kind."""
        units = {
            "q": self.heads_per_group * self.head_dim,
            "kv": self.head_dim,
            "qkv": (self.heads_per_group + 2) * self.head_dim,
            "head": self.heads_per_group,
            "kv_head": 1,
            "channel": 1,
            "expert": 1,
        }
        return units[segment]

    def n_pieces(self, part: Part) -> int:
        """Pieces of a part: KV groups of attention, channels of the MLP or experts of a mixture."""
        return self.n_kv_heads if part == "attention" else self.n_experts or self.n_channels

    def is_mixture(self, part: Part) -> bool:
        """Whether the pieces of a part are experts."""
        return part == "mlp" and self.n_experts > 0

    def writer(self, part: Part) -> Linear:
        """The linear layer through which a part writes to the residual stream (o_proj, down_proj)."""
        return next(linear for linear in self.linears if linear.part == part and linear.side == "writes")

    def readers(self, part: Part) -> tuple[Linear, ...]:
        """The linear layers that read a part's input."""
        return tuple(linear for linear in self.linears if linear.part == part and linear.side == "reads")

    def norm_before(self, part: Part) -> Norm | None:
        """The norm before a part; None if the part reads the residual stream directly."""
        return next((norm for norm in self.norms if part in norm.parts and norm.place == "before"), None)

    def norm_after(self, part: Part) -> Norm | None:
        """The norm on a part's output, if there is one."""
        return next((norm for norm in self.norms if norm.part == part and norm.place == "after"), None)

    def shift_folds(self, part: Part) -> bool:
        """Whether the layers that read a norm have biases, which can take the norm's bias."""
        norm = self.norm_before(part)
        return all(linear.bias for served in (norm.parts if norm else (part,)) for linear in self.readers(served))

    def cut_size(self, linear: Linear) -> int:
        """Size of the weight along its cut axis, in a whole layer."""
        if linear.whole is not None:
            return linear.whole
        if linear.per_expert:
            return self.n_channels
        return sum(self.unit(segment) for segment in linear.segments) * self.n_pieces(linear.part)

    def modules(self, linear: Linear) -> tuple[str, ...]:
        """The module of a linear layer; one for each expert of a mixture."""
        if not linear.per_expert:
            return (linear.module,)
        return tuple(linear.module.format(expert=expert) for expert in range(self.n_experts))

    def linear_shape(self, linear: Linear) -> tuple[int, int]:
        """`[out, in]` shape of a linear layer's weight."""
        size = self.cut_size(linear)
        return (size, self.width) if linear.side == "reads" else (self.width, size)

    def norm_shape(self, norm: Norm) -> tuple[int, ...]:
        if norm.place != "inside":
            return (self.width,)
        if norm.rows is None:
            return (self.head_dim,)
        size = self.unit(norm.rows) * self.n_pieces(norm.part)
        return (size, self.head_dim) if norm.rows in ("head", "kv_head") else (size,)

    def layer_shapes(self, layer: int = 0) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a layer, by name inside the layer; equal for all layers with a family file."""
        if self.inspected is not None:
            return dict(self.inspected.shapes[layer])
        shapes: dict[str, tuple[int, ...]] = {}
        for norm in self.norms:
            if norm.weight:
                shapes[f"{norm.module}.weight"] = self.norm_shape(norm)
            if norm.bias:
                shapes[f"{norm.module}.bias"] = self.norm_shape(norm)
        for linear in self.linears:
            out, into = self.linear_shape(linear)
            for module in self.modules(linear):
                shapes[f"{module}.weight"] = (out, into)
                if linear.bias:
                    shapes[f"{module}.bias"] = (out,)
        return shapes

    def tensor_name(self, layer: int, local: str) -> str:
        """Full name in a checkpoint of a layer's tensor."""
        return f"{self.family.modules.layers}.{layer}.{local}"

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer; the mean if layers differ."""
        layers = range(self.n_layers if self.inspected else 1)
        return sum(prod(shape) for layer in layers for shape in self.layer_shapes(layer).values()) // len(layers)
