"""The layers of a recipe in memory: what each is made of, what is fitted on it, and its module. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from intarsia.building.loaded_model import LoadedModel
from intarsia.recipe.recipe import Fitted, Op, Recipe, Select

Tensors: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""What is fitted on a layer, by name inside it."""

Layer: TypeAlias = tuple[Op, Tensors | None]


class Placed(NamedTuple):
    """A layer's module, and the original layer whose other arguments (masks, positions) it takes."""

    module: nn.Module
    source: int


class RecipeLayers:
    """Layers that can be exchanged.

    Attributes:
        ops: what each layer is made of.
        fitted: what is fitted on each layer, or None.
        modules: the layers' modules.
    """

    def __init__(self, resident: LoadedModel, ops: Sequence[Op], fitted: Fitted | None = None) -> None:
        """
        Args:
            fitted: tensors that replace layers' own, by layer.
        """
        self.resident = resident
        self.architecture = resident.architecture
        self.become(ops, fitted)

    @classmethod
    def of(cls, recipe: Recipe, resident: LoadedModel) -> RecipeLayers:
        """The layers of a recipe."""
        return RecipeLayers(resident, recipe.layers, recipe.fitted)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.ops)

    def placed(self, start: int = 0, stop: int | None = None) -> list[Placed]:
        """Layers `start` .. `stop - 1` (default: to the last), to be run."""
        layers = zip(self.modules[start:stop], self.ops[start:stop], strict=True)
        return [Placed(module, op.sources[0].layer) for module, op in layers]

    def become(self, ops: Sequence[Op], fitted: Fitted | None = None) -> None:
        """Be made of other layers from now on."""
        self.ops = list(ops)
        self.fitted: list[Tensors | None] = [(fitted or {}).get(index) or None for index in range(len(ops))]
        self.modules = [self.resident.module(op, own) for op, own in zip(self.ops, self.fitted, strict=True)]

    def exchange(self, start: int, count: int, ops: Sequence[Op]) -> None:
        """Put `ops` in the place of `count` layers."""
        self.ops[start : start + count] = ops
        self.fitted[start : start + count] = [None] * len(ops)
        self.modules[start : start + count] = [self.resident.module(op) for op in ops]

    def fit(self, index: int, fitted: Tensors | None, module: nn.Module | None = None) -> None:
        """Have these tensors, or none, on a layer (`module` with them, where there is one)."""
        if fitted is not self.fitted[index]:
            self.fitted[index] = fitted
            # An offloaded module takes no memory, which one with values does.
            keep = module if not self.resident.streams else None
            self.modules[index] = keep or self.resident.module(self.ops[index], fitted)


def is_whole(layers: Sequence[Layer], n_layers: int) -> bool:
    """Whether these are all layers of the original, in order, as they were."""
    return len(layers) == n_layers and all(
        isinstance(op, Select) and op.source.layer == index and fitted is None
        for index, (op, fitted) in enumerate(layers)
    )
