"""A cache with a bound in bytes, out of which the values that were used longest ago are dropped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Values by key, `limit` bytes of them at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which now counts as used; None if it is not there."""
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Hold a value in place of the oldest ones. One that is larger than the whole cache is not held."""
        if key in self._held:
            self.nbytes -= self._held.pop(key)[1]
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self.nbytes -= self._held.popitem(last=False)[1][1]
        self._held[key] = (value, nbytes)
        self.nbytes += nbytes

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)


def bytes_of(tensor: Tensor) -> int:
    """What a tensor occupies; a view counts as what it shows."""
    return tensor.numel() * tensor.element_size()
