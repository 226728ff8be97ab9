"""Where the pieces of a layer live.

A *piece* is the smallest thing that may be cut out of a layer and put into another:

- a **KV group** of attention: one key/value head with all the query heads that read it (rows of q, k and v,
  columns of o). Under grouped-query attention query head `j` reads key/value head `j // heads_per_group`, so a
  group's query heads are consecutive rows.
- an **MLP channel**: one row of gate and up, one column of down.

A linear layer that *reads* the residual stream holds its pieces as rows (axis 0 of a `[out, in]` weight, and the
entries of its bias); one that *writes* to it holds them as columns (axis 1), and its bias belongs to no piece.
Along that axis a tensor is a sequence of *segments*; a segment holds every piece in order, `unit` rows each. Most
layers have one segment; a fused projection has several.

Nothing here imports torch: an anatomy is data about a `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of one part. `segments` name units: `q`, `kv` or `channel` (see `Anatomy.unit`)."""

    module: str
    part: Part
    side: Literal["reads", "writes"]
    segments: tuple[str, ...]
    bias: bool

    @property
    def cut_axis(self) -> int:
        """The axis of the `[out, in]` weight along which pieces lie."""
        return 0 if self.side == "reads" else 1


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of one part.

    `before`: it makes the input of the part's reading layers, so its parameters can be folded into them exactly.
    `inside`: it acts after a projection (QK-norm), per channel of a head; it cannot be folded.
    `offset`: the norm multiplies by `weight + offset`.
    """

    module: str
    part: Part
    place: Literal["before", "inside"]
    offset: float
    weight: bool
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family, as read from its TOML file."""

    name: str
    title: str
    model_types: tuple[str, ...]
    layers_module: str
    embedding_module: str
    head_module: str
    fields: Mapping[str, str]
    per_layer_fields: tuple[str, ...]
    approximations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A family's anatomy with the numbers of one model's config."""

    family: Family
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    n_layers: int
    width: int
    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    n_channels: int
    vocabulary: int
    tied: bool
    layer_types: tuple[str, ...] | None
    config: Mapping[str, Any]

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key/value head."""
        return self.n_query_heads // self.n_kv_heads

    def unit(self, segment: str) -> int:
        """Rows (or columns) that one piece takes in a segment of this kind."""
        return {"q": self.heads_per_group * self.head_dim, "kv": self.head_dim, "channel": 1}[segment]

    def n_pieces(self, part: Part) -> int:
        """Pieces of a part: KV groups of attention, channels of the MLP."""
        return self.n_kv_heads if part == "attention" else self.n_channels

    def writer(self, part: Part) -> Linear:
        """The linear layer through which a part writes to the residual stream (o_proj, down_proj)."""
        return next(linear for linear in self.linears if linear.part == part and linear.side == "writes")

    def norm_before(self, part: Part) -> Norm:
        """The norm that makes a part's input."""
        return next(norm for norm in self.norms if norm.part == part and norm.place == "before")

    def cut_size(self, linear: Linear) -> int:
        """Size of the weight along its cut axis, in a whole layer."""
        return sum(self.unit(segment) for segment in linear.segments) * self.n_pieces(linear.part)

    def linear_shape(self, linear: Linear) -> tuple[int, int]:
        """`[out, in]` shape of a linear layer's weight."""
        size = self.cut_size(linear)
        return (size, self.width) if linear.side == "reads" else (self.width, size)

    def norm_size(self, norm: Norm) -> int:
        """Entries of a norm's weight."""
        return self.head_dim if norm.place == "inside" else self.width

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a layer, by its name inside the layer, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for norm in self.norms:
            if norm.weight:
                shapes[f"{norm.module}.weight"] = (self.norm_size(norm),)
            if norm.bias:
                shapes[f"{norm.module}.bias"] = (self.norm_size(norm),)
        for linear in self.linears:
            out, into = self.linear_shape(linear)
            shapes[f"{linear.module}.weight"] = (out, into)
            if linear.bias:
                shapes[f"{linear.module}.bias"] = (out,)
        return shapes

    def tensor_name(self, layer: int, local: str) -> str:
        """Full name in a checkpoint of a layer's tensor."""
        return f"{self.family.layers_module}.{layer}.{local}"

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        total = 0
        for shape in self.layer_shapes().values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total
