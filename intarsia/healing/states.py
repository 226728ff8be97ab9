"""The hidden states that layers are trained with.

The teacher's are `intarsia.healing.teacher`'s; the student's are made here, in one pass that goes deeper as training
does, behind its trained layers.

Padding is on the right and attention looks back only, so real tokens are the same whether or not the model is told of
the padding: it is not, which makes a layer's arguments the same for every batch of a size. What stands at padding is
left out by the losses.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.building.resident import Resident
from intarsia.calibration.batches import Batches
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerStream
from intarsia.recipe.recipe import Recipe


class StudentStates:
    """What the output layers before the next one give, on all sequences: one depth, overwritten as it goes on."""

    def __init__(self, recipe: Recipe, resident: Resident, ids_NT: Tensor, store: HiddenStore) -> None:
        self.recipe = recipe
        self.resident = resident
        self.ids_NT = ids_NT
        self.store = store
        self.stream = LayerStream(resident.model, resident.architecture)
        self.batches = plain_batches(resident, ids_NT)
        self.at: int | None = None

    @torch.no_grad()
    def reach(self, index: int, fitted: Mapping[int, Mapping[str, npt.NDArray[np.float32]]]) -> None:
        """Have what output layer `index` is fed, with `fitted` in the layers before it.

        Raises:
            UserError: the hidden states are not finite, or the disk is full.
        """
        first = self.at or 0
        modules = [self.resident.module(self.recipe.layers[i], fitted.get(i)) for i in range(first, index)]
        if self.at is None:
            self.batches.each(self._enter)
        for layer, module in enumerate(self.resident.walk(modules), first):
            self._through(layer, module)
        self.at = index

    def _enter(self, rows: slice, ids: Tensor, _: Tensor | None) -> None:
        self.store.put(0, rows.start, self.stream.enter(ids, None).h_BTD)

    def _through(self, layer: int, module: nn.Module) -> None:
        donor = self.recipe.layers[layer].sources[0].layer

        def work(rows: slice, ids: Tensor, _: Tensor | None) -> None:
            h_BTD = self.store.get(0, rows.start, rows.stop, self.resident.device)
            h_BTD = self.stream.run(module, h_BTD, self.stream.calls(ids, None)[donor])
            require_finite(h_BTD, f"the student's hidden states behind layer {layer}")
            self.store.put(0, rows.start, h_BTD)

        self.batches.each(work)


@dataclass(frozen=True, kw_only=True)
class States:
    """The hidden states at one depth of a store."""

    store: HiddenStore
    depth: int

    def rows(self, index: Sequence[int]) -> Tensor:
        """Some sequences' hidden states, `[B, T, D]`: a copy."""
        return self.store.rows(self.depth, index, torch.device("cpu"))


def plain_batches(resident: Resident, ids_NT: Tensor) -> Batches:
    """All sequences, without a word on padding."""
    return Batches(Corpus.of(ids_NT, description="training text", documents=1), resident.device)
