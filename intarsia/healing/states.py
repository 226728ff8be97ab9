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
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intarsia.building.resident import Resident
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerCall, LayerStream
from intarsia.errors import UserError
from intarsia.recipe.recipe import Recipe

_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 32768


class TeacherStates:
    """H^depth of a teacher on all sequences, for the depths asked for and not yet dropped."""

    def __init__(self, teacher: Resident, ids_NT: Tensor, store: HiddenStore) -> None:
        self.teacher = teacher
        self.ids_NT = ids_NT
        self.store = store
        self.stream = LayerStream(teacher.model, teacher.anatomy)
        self.batch = _batch(teacher, ids_NT)

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
        n = self.ids_NT.shape[0]
        for start in range(0, n, self.batch):
            ids_BT = self.ids_NT[start : start + self.batch]
            if before:
                h_BTD = self.store.get(first, start, start + len(ids_BT), self.teacher.device)
            else:
                h_BTD = self.stream.enter(ids_BT, None).h_BTD
            calls = self.stream.calls(ids_BT, None)
            for layer in range(first, depth):
                h_BTD = self.stream.run(self.teacher.layers[layer], h_BTD, calls[layer])
            require_finite(h_BTD, f"the teacher's output of layer {depth - 1}")
            self.store.put(depth, start, h_BTD)
            if advance is not None:
                advance(len(ids_BT) * (depth - first))

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
        self.batch = _batch(resident, ids_NT)
        self.at: int | None = None

    @torch.no_grad()
    def reach(self, index: int, fitted: Mapping[int, Mapping[str, npt.NDArray[np.float32]]]) -> None:
        """Have what output layer `index` is fed, with `fitted` in the layers before it.

        Raises:
            UserError: the hidden states are not finite, or the disk is full.
        """
        first = self.at or 0
        modules = [self.resident.module(self.recipe.layers[i], fitted.get(i)) for i in range(first, index)]
        donors = [self.recipe.layers[i].sources[0].layer for i in range(first, index)]
        for start in range(0, self.ids_NT.shape[0], self.batch):
            ids_BT = self.ids_NT[start : start + self.batch]
            if self.at is None:
                h_BTD = self.stream.enter(ids_BT, None).h_BTD
            else:
                h_BTD = self.store.get(0, start, start + len(ids_BT), self.resident.device)
            calls = self.stream.calls(ids_BT, None)
            for module, donor in zip(modules, donors, strict=True):
                h_BTD = self.stream.run(module, h_BTD, calls[donor])
            require_finite(h_BTD, f"the student's hidden states before layer {index}")
            self.store.put(0, start, h_BTD)
        self.at = index

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


def _batch(resident: Resident, ids_NT: Tensor) -> int:
    """Sequences of one forward pass."""
    tokens = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
    return max(1, tokens // ids_NT.shape[1])
