"""The hidden states that layers are trained with.

The teacher's, at the depths that are needed, are made in one pass that goes deeper as training does; so are the
student's, behind its trained layers.

Padding is on the right and attention looks back only, so real tokens are the same whether or not the model is told of
the padding: it is not, which makes a layer's arguments the same for every batch of a size. What stands at padding is
left out by the losses.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.building.resident import Resident
from intarsia.calibration.batches import Batches
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerCall, LayerStream
from intarsia.errors import UserError
from intarsia.recipe.recipe import Recipe


class TeacherStates:
    """H^depth of a teacher on all sequences, for the depths asked for and not yet dropped."""

    def __init__(self, teacher: Resident, ids_NT: Tensor, store: HiddenStore) -> None:
        self.teacher = teacher
        self.ids_NT = ids_NT
        self.store = store
        self.stream = LayerStream(teacher.model, teacher.anatomy)
        self.batches = _batches(teacher, ids_NT)

    @torch.no_grad()
    def reach(self, depth: int, advance: Callable[[float], None] | None = None) -> None:
        """Have H^depth: from the deepest stored one in front of it, or from the embedding.

        `advance` is told of sequences times layers.

        Raises:
            UserError: the hidden states are not finite, or the disk is full.
        """
        if depth in self.store.depths():
            return
        before = [stored for stored in self.store.depths() if stored < depth]
        first = before[-1] if before else 0
        if not before:
            self.batches.each(
                lambda rows, ids, _: self.store.put(depth, rows.start, self.stream.enter(ids, None).h_BTD)
            )
        for layer, module in enumerate(self.teacher.walk(self.teacher.layers[first:depth]), first):
            self._through(layer, module, first if before and layer == first else depth, depth)
            if advance is not None:
                advance(len(self.ids_NT))

    def _through(self, layer: int, module: nn.Module, at: int, depth: int) -> None:
        """Run one layer from the states stored at a depth; what it gives is stored at another."""

        def work(rows: slice, ids: Tensor, _: Tensor | None) -> None:
            h_BTD = self.store.get(at, rows.start, rows.stop, self.teacher.device)
            h_BTD = self.stream.run(module, h_BTD, self.stream.calls(ids, None)[layer])
            require_finite(h_BTD, f"the teacher's output of layer {layer}")
            self.store.put(depth, rows.start, h_BTD)

        self.batches.each(work)

    def call(self, layer: int, sequences: int) -> LayerCall:
        """The arguments of an original layer for a batch of so many sequences."""
        with torch.no_grad():
            return self.stream.calls(self.ids_NT[:sequences], None)[layer]


class StudentStates:
    """What the output layers before the next one give, on all sequences: one depth, overwritten as it goes on."""

    def __init__(self, recipe: Recipe, resident: Resident, ids_NT: Tensor, store: HiddenStore) -> None:
        self.recipe = recipe
        self.resident = resident
        self.ids_NT = ids_NT
        self.store = store
        self.stream = LayerStream(resident.model, resident.anatomy)
        self.batches = _batches(resident, ids_NT)
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
            self.batches.each(partial(_enter, self.stream, self.store, 0))
        for layer, module in enumerate(self.resident.walk(modules), first):
            self._through(layer, module)
        self.at = index

    def _through(self, layer: int, module: nn.Module) -> None:
        donor = self.recipe.layers[layer].sources[0].layer

        def work(rows: slice, ids: Tensor, _: Tensor | None) -> None:
            h_BTD = self.store.get(0, rows.start, rows.stop, self.resident.device)
            h_BTD = self.stream.run(module, h_BTD, self.stream.calls(ids, None)[donor])
            require_finite(h_BTD, f"the student's hidden states behind layer {layer}")
            self.store.put(0, rows.start, h_BTD)

        self.batches.each(work)

    def here(self) -> StatesInMemory:
        """What was reached last."""
        return StatesInMemory(store=self.store, depth=0)


@dataclass(frozen=True, kw_only=True)
class StatesFile:
    """Hidden states in a file, to be read by another process."""

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def rows(self, index: Sequence[int]) -> Tensor:
        """Some sequences' hidden states, `[B, T, D]`: a copy.

        Raises:
            UserError: the file is not here.
        """
        n, t, d = self.shape
        if not self.path.exists():
            raise UserError.of(
                where=str(self.path),
                expected="the teacher's hidden states, which every worker reads",
                found="no such file on this worker",
                remedy="Put the run folder (--run) where all Dask workers see it under the same path.",
            )
        flat = torch.from_file(str(self.path), shared=False, size=n * t * d, dtype=self.dtype)
        return flat.view(n, t, d)[list(index)]


@dataclass(frozen=True, kw_only=True)
class StatesInMemory:
    """Hidden states in this process."""

    store: HiddenStore
    depth: int

    def rows(self, index: Sequence[int]) -> Tensor:
        """Some sequences' hidden states, `[B, T, D]`: a copy."""
        return self.store.rows(self.depth, index, torch.device("cpu"))


def _enter(
    stream: LayerStream, store: HiddenStore, depth: int, rows: slice, ids_BT: Tensor, mask_BT: Tensor | None
) -> None:
    store.put(depth, rows.start, stream.enter(ids_BT, None).h_BTD)


def _batches(resident: Resident, ids_NT: Tensor) -> Batches:
    """All sequences, without a word on padding."""
    return Batches(Corpus.of(ids_NT, description="training text", documents=1), resident.device)
