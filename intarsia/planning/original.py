"""What the original model gives behind each of its layers: what a repaired layer is held against.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from intarsia.building.resident import Resident
from intarsia.calibration.batches import Batches
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.room import Room
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerStream

_COPIED = 8  # sequences at a time


class Original:
    """H^1 .. H^L of the original on the first `sequences` of the calibration set. Empty until `copy` or `run`."""

    def __init__(self, resident: Resident, corpus: Corpus, *, sequences: int, room: Room) -> None:
        self.resident = resident
        self.corpus = corpus
        self.sequences = sequences
        shape = (sequences, corpus.seq_len, resident.anatomy.width)
        self.store = HiddenStore(shape, resident.model.dtype, room=room)

    def copy(self, hidden: HiddenStore) -> None:
        """Take over what was measured on the whole model."""
        for depth in range(1, self.resident.anatomy.n_layers + 1):
            for start in range(0, self.sequences, _COPIED):
                stop = min(start + _COPIED, self.sequences)
                self.store.put(depth, start, hidden.get(depth, start, stop, torch.device("cpu")))

    @torch.inference_mode()
    def run(self, stream: LayerStream, batches: Batches) -> None:
        """Run the original: a layer-forward over its sequences for every layer.

        Raises:
            UserError: hidden states are not finite, or the disk is full.
        """
        sequences = slice(0, self.sequences)
        batches.each(lambda part, ids, mask: self.store.put(0, part.start, stream.enter(ids, mask).h_BTD), sequences)
        for layer, module in enumerate(self.resident.walk(self.resident.layers)):
            batches.each(partial(self._through, stream, layer, module), sequences)
        self.store.drop(0)

    def _through(
        self, stream: LayerStream, layer: int, module: nn.Module, part: slice, ids: Tensor, mask: Tensor | None
    ) -> None:
        h_BTD = stream.run(module, self.at(layer, part), stream.calls(ids, mask)[layer])
        require_finite(h_BTD, f"output of layer {layer} of the original")
        self.store.put(layer + 1, part.start, h_BTD)

    def at(self, depth: int, part: slice) -> Tensor:
        """H^depth of some of its sequences, `[B, T, D]`."""
        return self.store.get(depth, part.start, part.stop, self.resident.device)

    def close(self) -> None:
        """Free the hidden states."""
        self.store.close()
