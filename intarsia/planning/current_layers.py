"""The layers that a model in the middle of pruning is made of, each with what is fitted on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from intarsia.building.resident import Resident
from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.recipe.recipe import Fitted

Tensors: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""What is fitted on a layer, by name inside it."""

Layer: TypeAlias = tuple[Op, Tensors | None]


class CurrentLayers:
    """Layers that can be exchanged; nothing is run.

    Attributes:
        ops: what each current layer is made of.
        fitted: what is fitted on each current layer, or None.
        modules: the current layer modules.
    """

    def __init__(self, resident: Resident, ops: Sequence[Op], fitted: Fitted | None) -> None:
        """
        Args:
            fitted: tensors that replace layers' own, by layer.
        """
        self.resident = resident
        self.architecture = resident.architecture
        self.become(ops, fitted)

    @property
    def depth(self) -> int:
        """Current number of layers."""
        return len(self.ops)

    def become(self, ops: Sequence[Op], fitted: Fitted | None = None) -> None:
        """Be made of other layers from now on; nothing is run."""
        self.ops = list(ops)
        self.fitted: list[Tensors | None] = [(fitted or {}).get(index) or None for index in range(len(ops))]
        self.modules = [self.resident.module(op, own) for op, own in zip(self.ops, self.fitted, strict=True)]

    def fit(self, index: int, fitted: Tensors | None, module: nn.Module | None = None) -> None:
        """Have these tensors, or none, on a layer (`module` with them, where there is one); nothing is run."""
        if fitted is not self.fitted[index]:
            self.fitted[index] = fitted
            # A module at rest takes no memory, which one with values does.
            keep = module if not self.resident.streams else None
            self.modules[index] = keep or self.resident.module(self.ops[index], fitted)


def is_whole(layers: Sequence[Layer], n_layers: int) -> bool:
    """Whether these are all layers of the original, in order, as they were."""
    return len(layers) == n_layers and all(
        isinstance(op, Select) and op.source.layer == index and fitted is None
        for index, (op, fitted) in enumerate(layers)
    )


def original_ops(layers: Sequence[Op], n_layers: int) -> list[Op]:
    """All layers of the original that these are made of, in order."""
    variant = layers[0].sources[0].variant
    return [Select(source=LayerRef(variant=variant, layer=layer)) for layer in range(n_layers)]
