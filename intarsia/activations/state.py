"""What one layer hands to the next, as one tensor: the residual stream and, in some models, more.

Its first columns are the residual stream. The other streams follow in models that have several (Gemma 3n, DeepSeek 4),
and then the keys and values that later layers read, where layers share them (Gemma 3n and 4): zeros until they are
made. So any layer can be run by itself, from a state that is kept.

Shape suffixes: `B` sequences, `T` tokens, `S` width of the state, `D` of the residual stream, `H` heads of keys and
values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shared = dict[str, tuple[Tensor, Tensor]]
"""Keys and values, `[B, H, T, ...]` each, by the kind of layer that reads them."""


@dataclass(frozen=True, kw_only=True)
class State:
    """How a state is laid out."""

    # Of the residual stream.
    width: int
    # Residual streams, and which dimension of the model's own hidden states they are; None: of the last one.
    streams: int = 1
    axis: int | None = None
    # Columns of the keys (and as many of the values), and those of one head, by the kind of layer.
    shared: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, shape: Sequence[int], width: int, layers: Iterable[nn.Module]) -> State:
        """The layout in a model.

        Args:
            shape: of its own hidden states, of one sequence of two tokens.
            layers: where some may read the keys and values of others.
        """
        shared = {}
        for layer in layers:
            attention: Any = getattr(layer, "self_attn", None)
            if getattr(attention, "store_full_length_kv", False):
                shared[str(attention.layer_type)] = (int(attention.k_proj.out_features), int(attention.head_dim))
        axis = None if len(shape) == 3 else 2 if tuple(shape[:2]) == (1, 2) else 0
        return cls(width=width, streams=math.prod(shape) // (2 * width), axis=axis, shared=shared)

    @property
    def size(self) -> int:
        """All columns."""
        return self.width * self.streams + 2 * sum(columns for columns, _ in self.shared.values())

    def packed(self, hidden: Tensor, shared: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The state `[B, T, S]`, of the model's own hidden states and what is shared so far."""
        h_BTD = hidden if self.axis is None else hidden.movedim(self.axis, 2).flatten(2)
        parts = [h_BTD]
        for kind, (columns, _) in self.shared.items():
            if kind in shared:
                parts += [each.transpose(1, 2).flatten(2).to(h_BTD.dtype) for each in shared[kind]]
            else:
                parts.append(h_BTD.new_zeros(*h_BTD.shape[:2], 2 * columns))
        return torch.cat(parts, dim=-1) if self.shared else h_BTD

    def unpacked(self, state_BTS: Tensor) -> tuple[Tensor, Shared]:
        """The model's own hidden states, and what is shared, of a state."""
        start, found = self.width * self.streams, Shared()
        hidden = state_BTS[..., :start]
        for kind, (columns, head) in self.shared.items():
            both = state_BTS[..., start : start + 2 * columns].unflatten(-1, (2, -1, head)).permute(2, 0, 3, 1, 4)
            found[kind], start = (both[0], both[1]), start + 2 * columns
        if self.axis is not None:
            hidden = hidden.unflatten(2, (self.streams, self.width)).movedim(2, self.axis)
        return hidden, found
