"""A key/value cache that is allocated once.

The cache of `transformers` copies all keys and values of every layer at each new token to append one position: a fifth
of the time that a small model takes to write on the CPU. Here the room is there from the start, and what attention
gets is a view of the part that is filled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _RoomyLayer(DynamicLayer):
    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the new positions into the room, and give all that are filled."""
        if self.filled == 0:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self.all_keys = key_states.new_empty(rows, heads, self.room, width)
            self.all_values = value_states.new_empty(rows, heads, self.room, value_states.shape[-1])
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        assert self.filled <= self.room, "more positions than there is room for"
        self.all_keys[:, :, start : self.filled] = key_states
        self.all_values[:, :, start : self.filled] = value_states
        self.keys = self.all_keys[:, :, : self.filled]
        self.values = self.all_values[:, :, : self.filled]
        return self.keys, self.values


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """An empty cache with room for `room` positions; layers with a sliding window keep the cache of `transformers`."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
