"""What one layer hands to the next, as one tensor: the residual stream and, in some models, more.

Its first columns are the residual stream. The other streams follow in models that have several (Gemma 3n), and then
the keys and values that later layers read, where layers share them (Gemma 3n and 4): zeros until they are made. So any
layer can be run by itself, from a state that is kept.

Shape suffixes: `B` sequences, `T` tokens, `S` width of the state, `D` of the residual stream, `H` heads of keys and
values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    # Residual streams; 0: the only one is `[B, T, D]` in the model, and not `[1, B, T, D]`.
    streams: int = 0
    # Columns of the keys (and as many of the values), and those of one head, by the kind of layer.
    shared: Mapping[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """All columns."""
        return self.width * max(self.streams, 1) + 2 * sum(columns for columns, _ in self.shared.values())

    def packed(self, hidden: Tensor, shared: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The state `[B, T, S]`, of the model's own hidden states and what is shared so far."""
        if not self.streams and not self.shared:
            return hidden
        h_BTD = hidden.permute(1, 2, 0, 3).flatten(2) if self.streams else hidden
        parts = [h_BTD]
        for kind, (columns, _) in self.shared.items():
            if kind in shared:
                parts += [each.transpose(1, 2).flatten(2).to(h_BTD.dtype) for each in shared[kind]]
            else:
                parts.append(h_BTD.new_zeros(*h_BTD.shape[:2], 2 * columns))
        return torch.cat(parts, dim=-1)

    def unpacked(self, state_BTS: Tensor) -> tuple[Tensor, Shared]:
        """The way back."""
        own = self.width * max(self.streams, 1)
        hidden, start, found = state_BTS[..., :own], own, Shared()
        for kind, (columns, head) in self.shared.items():
            both = state_BTS[..., start : start + 2 * columns].unflatten(-1, (2, -1, head)).permute(2, 0, 3, 1, 4)
            found[kind], start = (both[0], both[1]), start + 2 * columns
        if self.streams:
            hidden = hidden.unflatten(2, (self.streams, self.width)).permute(2, 0, 1, 3)
        return hidden, found


def shared_by(layers: Iterable[nn.Module]) -> dict[str, tuple[int, int]]:
    """Columns of the keys that later layers read, and those of one head, by the kind of layer."""
    found = {}
    for layer in layers:
        attention: Any = getattr(layer, "self_attn", None)
        if getattr(attention, "store_full_length_kv", False):
            found[str(attention.layer_type)] = (int(attention.k_proj.out_features), int(attention.head_dim))
    return found
