"""The teacher's hidden states at the depths that are needed, made in one pass that goes deeper as training does.

Padding is on the right and attention looks back only, so real tokens are the same whether or not the model is told of
the padding: it is not, which makes a layer's arguments the same for every batch of a size. What stands at padding is
left out by the losses.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from intarsia.building.resident import Resident
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerCall, LayerStream
from intarsia.errors import UserError

_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 32768


class TeacherStates:
    """H^depth of a teacher on all sequences, for the depths asked for and not yet dropped."""

    def __init__(self, teacher: Resident, ids_NT: Tensor, store: HiddenStore) -> None:
        self.teacher = teacher
        self.ids_NT = ids_NT
        self.store = store
        self.stream = LayerStream(teacher.model, teacher.anatomy)
        tokens = _CUDA_BATCH_TOKENS if teacher.device.type == "cuda" else _CPU_BATCH_TOKENS
        self.batch = max(1, tokens // ids_NT.shape[1])

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
