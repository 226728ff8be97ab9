"""A cache with a bound in bytes, out of which the values that were used longest ago are dropped."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from intarsia.recipe.ops import Op
from intarsia.recipe.recipe import Recipe

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


_PATHS = 4  # that fit at least


def layer_key(op: Op, fitted: Mapping[str, npt.NDArray[np.float32]] | None = None) -> str:
    """The same for two layers of the same tensors, run with the same arguments, within one family."""
    digest = hashlib.sha256(f"{type(op).__name__} {json.dumps(asdict(op), sort_keys=True)}".encode())
    for name, array in sorted((fitted or {}).items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def path_of(recipe: Recipe) -> tuple[str, ...]:
    """A key behind every layer of a recipe."""
    found: list[str] = []
    for index, op in enumerate(recipe.layers):
        before = found[-1] if found else ""
        own = layer_key(op, recipe.fitted.get(index))
        found.append(hashlib.sha256(f"{before}/{own}".encode()).hexdigest())
    return tuple(found)


class Prefixes:
    """Hidden states by key and batch, `limit` bytes of them at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._nodes: OrderedDict[str, dict[Hashable, Tensor]] = OrderedDict()
        self._path: tuple[str, ...] = ()
        self._stride = 1

    def begin(self, path: Sequence[str], depth_bytes: int) -> None:
        """A path is going to be run.

        Args:
            depth_bytes: hidden states of all its batches behind one layer.
        """
        self._path = tuple(path)
        self._stride = max(1, -(-len(path) * depth_bytes * _PATHS // max(self.limit, 1)))
        for key in reversed(self._path):  # the first layers last: they are what others will most likely share
            if key in self._nodes:
                self._nodes.move_to_end(key)

    def deepest(self, batch: Hashable) -> tuple[int, Tensor | None]:
        """Behind how many layers of the path a batch's state is known, and that state; 0 and None if behind none."""
        for depth in range(len(self._path), 0, -1):
            h_BTD = self._nodes.get(self._path[depth - 1], {}).get(batch)
            if h_BTD is not None:
                return depth, h_BTD
        return 0, None

    def keep(self, depth: int, batch: Hashable, h_BTD: Tensor) -> None:
        """The state of a batch behind `depth` layers of the path, if that is a depth to keep and there is room."""
        # The state behind the last layer is of no use to others: whoever shares it is the same recipe.
        if depth % self._stride or depth == len(self._path):
            return
        size = bytes_of(h_BTD)
        if not self._make_room(size):
            return
        node = self._nodes.setdefault(self._path[depth - 1], {})
        assert batch not in node, "a state that is known is not computed again"
        node[batch] = h_BTD
        self.nbytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._nodes.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def _make_room(self, size: int) -> bool:
        if self.nbytes + size <= self.limit:
            return True
        own = set(self._path)
        for key in [key for key in self._nodes if key not in own]:
            self.nbytes -= sum(bytes_of(h_BTD) for h_BTD in self._nodes.pop(key).values())
            if self.nbytes + size <= self.limit:
                return True
        return False
