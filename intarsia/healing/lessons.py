"""What the teacher makes of a text: its hidden states at the depths that fits ask for.

They depend on teacher and text alone, so several fits may share them, and a student whose first layers are the
teacher's own begins where it differs.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from intarsia.building.resident import Resident
from intarsia.calibration.batches import Batches
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.room import Room
from intarsia.calibration.stream import LayerStream
from intarsia.progress import Progress, Silent


class Lessons:
    """The teacher's hidden states by depth: 0 is what the embedding gives, b what layer b - 1 gives.

    Attributes:
        layers: the teacher's.
    """

    def __init__(
        self,
        resident: Resident,
        corpus: Corpus,
        *,
        teacher: Sequence[nn.Module] | None = None,
        keep: bool = False,
        batch_tokens: int | None = None,
        room: Room | None = None,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            resident: the original model; the teacher unless `teacher` is given.
            teacher: the layers of another one, between its embedding and head.
            keep: keep every depth that is passed, for fits to come, which may ask for others.
        """
        self.layers: Sequence[nn.Module] = resident.layers if teacher is None else teacher
        self.corpus, self.keep = corpus, keep
        self._resident = resident
        self._stream = LayerStream(resident.model, resident.anatomy)
        self._progress = progress or Silent()
        self._batches = Batches(corpus, resident.device, batch_tokens=batch_tokens, progress=progress)
        n, t = corpus.input_ids.shape
        shape, dtype = (n, t, resident.anatomy.width), resident.model.dtype
        room = room or Room()
        self._stored = HiddenStore(shape, dtype, room=room)
        self._running = HiddenStore(shape, dtype, room=room)

    def learn(self, depths: Iterable[int]) -> None:
        """One pass of the teacher for the depths that are not there yet, from the deepest one before them."""
        missing = set(depths) - set(self._stored.depths())
        if not missing:
            return
        begin = max((depth for depth in self._stored.depths() if depth < min(missing)), default=0)
        with self._progress.task("teacher", max(missing) - begin) as task:
            self._batches.each(lambda rows, ids, mask: self._begin(begin, rows, ids, mask))
            self._note(begin, missing)
            for layer, module in enumerate(self._resident.walk(self.layers[begin : max(missing)]), begin):
                through(self._batches, self._stream, self._running, module, layer)
                self._note(layer + 1, missing)
                task.advance()
        self._running.drop(0)

    def at(self, depth: int, rows: slice) -> Tensor:
        """`h_BTD` of some sequences at a depth that was learned, on the device."""
        return self._stored.get(depth, rows.start, rows.stop, self._resident.device)

    def forget(self, depth: int) -> None:
        """A depth is not asked for again by this fit."""
        if not self.keep:
            self._stored.drop(depth)

    def close(self) -> None:
        """Free everything."""
        self._stored.close()
        self._running.close()

    def _begin(self, depth: int, rows: slice, ids: Tensor, mask: Tensor | None) -> None:
        known = depth in self._stored.depths()
        h_BTD = self.at(depth, rows) if known else self._stream.enter(ids, mask).h_BTD
        self._running.put(0, rows.start, h_BTD)

    def _note(self, depth: int, missing: set[int]) -> None:
        if depth in self._stored.depths() or not (self.keep or depth in missing):
            return
        cpu = torch.device("cpu")
        for rows, _, _ in self._batches.over():
            self._stored.put(depth, rows.start, self._running.get(0, rows.start, rows.stop, cpu))


def through(batches: Batches, stream: LayerStream, store: HiddenStore, module: nn.Module, source: int) -> None:
    """Hidden states in depth 0 of a store go through a layer that is called like original layer `source`."""

    def work(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
        call = stream.calls(ids, mask)[source]
        h_BTD = store.get(0, rows.start, rows.stop, batches.device)
        store.put(0, rows.start, stream.run(module, h_BTD, call))

    batches.each(work)
