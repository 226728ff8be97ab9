"""What the original makes of a text: its hidden states by depth, which a repaired layer is held against.

They depend on the model and the text alone, so several fits may share them, and a student whose first layers are the
original's own begins where it differs. Where the whole model was measured already, they are read and not run again.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from intarsia.building.resident import Resident
from intarsia.calibration.batches import Batches
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.room import Room
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerStream
from intarsia.progress import Progress, Silent


class Original:
    """Hidden states by depth: 0 is what the embedding gives, b what layer b - 1 gives.

    Attributes:
        layers: those of the model that is the original.
        sequences: of the text, from the first on, it is known on.
        store: what it learned, by depth.
        cost: layers that were run on these sequences so far.
    """

    def __init__(
        self,
        resident: Resident,
        batches: Batches,
        *,
        layers: Sequence[nn.Module] | None = None,
        sequences: int | None = None,
        known: HiddenStore | None = None,
        keep: bool = False,
        room: Room | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is run yet; `learn` does that.

        Args:
            resident: the original model.
            batches: of the text.
            layers: of another model that is the original, between the resident one's embedding and head.
            sequences: all, unless it is said.
            known: its hidden states, where they were measured; they must stay as they are.
            keep: keep every depth that is passed, for fits to come, which may ask for others.
        """
        self.layers: Sequence[nn.Module] = resident.layers if layers is None else layers
        self.batches, self.keep, self.cost = batches, keep, 0
        corpus = batches.corpus
        self.sequences = len(corpus) if sequences is None else sequences
        self._resident = resident
        self._stream = LayerStream(resident.model, resident.anatomy)
        self._progress = progress or Silent()
        shape = (self.sequences, corpus.seq_len, resident.anatomy.width)
        self.store = HiddenStore(shape, resident.model.dtype, room=room)
        self._stores = [self.store, *([] if known is None else [known])]

    @torch.no_grad()
    def learn(self, depths: Iterable[int]) -> None:
        """One pass of the original for the depths that are not known yet, from the deepest one before them.

        Raises:
            UserError: hidden states are not finite, or the disk is full.
        """
        known = self._depths()
        missing = set(depths) - known
        if not missing:
            return
        before = [depth for depth in known if depth < min(missing)]
        begin = max(before, default=0)
        wanted = sorted(missing | set(range(begin, max(missing)) if self.keep else ()) - known)
        with self._progress.task("running the original", max(missing) - begin) as task:
            at = begin
            if not before:
                at = wanted[0]
                self.batches.each(partial(self._enter, at), self._all)
            for layer, module in enumerate(self._resident.walk(self.layers[begin : max(missing)]), begin):
                behind = next(depth for depth in wanted if depth > layer)
                self._through(layer, module, at, behind)
                self.cost += 1
                at = behind
                task.advance()

    def copy(self, hidden: HiddenStore) -> None:
        """Take over what was measured, which may change from now on."""
        for depth in hidden.depths():
            for rows, _, _ in self.batches.over(self._all):
                self.store.put(depth, rows.start, hidden.get(depth, rows.start, rows.stop, torch.device("cpu")))

    def at(self, depth: int, rows: slice) -> Tensor:
        """`h_BTD` of some sequences at a depth that is known, on the device."""
        store = next(store for store in self._stores if depth in store.depths())
        return store.get(depth, rows.start, rows.stop, self._resident.device)

    @property
    def states(self) -> HiddenStore:
        """All depths, of an original of which every depth is known; not to be changed."""
        found = [store for store in self._stores if len(store.depths()) > len(self.layers)]
        assert found, "it has not learned every depth"
        return found[0]

    def forget(self, depth: int) -> None:
        """A depth is not asked for again by this fit."""
        if not self.keep:
            self.store.drop(depth)

    def close(self) -> None:
        """Free what it stored itself."""
        self.store.close()

    @property
    def _all(self) -> slice:
        return slice(0, self.sequences)

    def _depths(self) -> set[int]:
        return {depth for store in self._stores for depth in store.depths()}

    def _enter(self, depth: int, rows: slice, ids: Tensor, mask: Tensor | None) -> None:
        self.store.put(depth, rows.start, self._stream.enter(ids, mask).h_BTD)

    def _through(self, layer: int, module: nn.Module, before: int, behind: int) -> None:
        """Run one layer from the states known at a depth; what it gives is stored at another."""

        def work(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
            h_BTD = self._stream.run(module, self.at(before, rows), self._stream.calls(ids, mask)[layer])
            require_finite(h_BTD, f"output of layer {layer} of the original")
            self.store.put(behind, rows.start, h_BTD)

        self.batches.each(work, self._all)


def kept_whole(resident: Resident, batches: Batches, *, room: Room, progress: Progress) -> Original | None:
    """One that keeps every depth, for several fits to share; None where memory has no room for all of them."""
    state = batches.corpus.input_ids.numel() * resident.anatomy.width * resident.model.dtype.itemsize
    if (resident.anatomy.n_layers + 1) * state > room.memory_bytes:
        return None
    return Original(resident, batches, keep=True, room=room, progress=progress)
