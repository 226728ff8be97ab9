"""Hidden states behind the first layers of recipes, kept for the next recipe that begins in the same way.

A recipe is a path of keys: the key behind a layer says what that layer and all before it are, so two recipes have a key
in common exactly where they begin with the same layers. Under each key lie the hidden states of the batches that were
run so far. Whole nodes are dropped, the one that was used longest ago first, but never one of the path that is being
run: a scan over many batches would otherwise push out its own beginning.

Two trials seldom differ in their last layer alone, and the states behind every layer of every trial would not fit. So
a path is kept at every `stride`-th depth, the stride such that one path takes a quarter of the room at most. A
candidate made from another by changing a layer repeats less than `stride` layers more than it must.

Shape suffixes: `B` rows, `T` columns, `D` residual width.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from torch import Tensor

from intarsia.recipe.ops import Op
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.byte_cache import bytes_of

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
