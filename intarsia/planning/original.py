"""What the original model gives behind each of its layers: what a repaired layer is held against.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerStream


class Original:
    """H^1 .. H^L of the original on the first `sequences` of the calibration set. Empty until `copy` or `run`."""

    def __init__(self, resident: Resident, corpus: Corpus, *, sequences: int, memory_bytes: int) -> None:
        self.resident = resident
        self.corpus = corpus
        self.sequences = sequences
        shape = (sequences, corpus.seq_len, resident.anatomy.width)
        self.store = HiddenStore(shape, resident.model.dtype, memory_bytes=memory_bytes)

    def copy(self, hidden: HiddenStore) -> None:
        """Take over what was measured on the whole model."""
        for depth in range(1, self.resident.anatomy.n_layers + 1):
            self.store.put(depth, 0, hidden.get(depth, 0, self.sequences, torch.device("cpu")))

    @torch.inference_mode()
    def run(self, stream: LayerStream, *, batch: int) -> None:
        """Run the original: a layer-forward over its sequences for every layer.

        Raises:
            UserError: hidden states are not finite, or the disk is full.
        """
        device, mask = self.resident.device, self.corpus.mask
        for start in range(0, self.sequences, batch):
            rows = slice(start, min(start + batch, self.sequences))
            entry = stream.enter(
                self.corpus.input_ids[rows].to(device), None if mask is None else mask[rows].to(device)
            )
            h_BTD = entry.h_BTD
            for layer, (module, call) in enumerate(zip(self.resident.layers, entry.calls, strict=True)):
                h_BTD = stream.run(module, h_BTD, call)
                require_finite(h_BTD, f"output of layer {layer} of the original")
                self.store.put(layer + 1, start, h_BTD)

    def at(self, depth: int, part: slice) -> Tensor:
        """H^depth of some of its sequences, `[B, T, D]`."""
        return self.store.get(depth, part.start, part.stop, self.resident.device)

    def close(self) -> None:
        """Free the hidden states."""
        self.store.close()
