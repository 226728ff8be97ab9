"""Layers that are run over the calibration set, with everything that is measured on them.

Hidden states are kept at every depth, so a change re-runs only the layers behind it, and a candidate is judged from
the hidden states in front of it (`intarsia.planning.candidates`). The unit of cost is a layer-forward over the
calibration set.

Shape suffixes: `N` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from intarsia.building.resident import Resident
from intarsia.calibration.batches import Batches
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.room import Room
from intarsia.calibration.stats import LayerMeasure
from intarsia.calibration.stream import LayerStream
from intarsia.planning import measuring
from intarsia.planning.current_layers import CurrentLayers, Layer
from intarsia.progress import Progress, Silent
from intarsia.recipe.ops import Op
from intarsia.recipe.recipe import Fitted


class Measured(CurrentLayers):
    """The current layers, their measures and hidden states.

    Attributes:
        measures: what each current layer does on the calibration set.
        batches: goes through the calibration set, as many sequences at a time as the device holds.
        room: what hidden states may take, for all stores that are needed on the way.
        losses_N: summed next-token loss of each sequence, in nats; `counts_N` the tokens predicted in it.
        layer_forwards: cost so far; a layer run on the whole calibration set once counts 1.
    """

    def __init__(
        self,
        resident: Resident,
        corpus: Corpus,
        ops: Sequence[Op],
        *,
        fitted: Fitted | None = None,
        batch_tokens: int | None = None,
        memory_bytes: int | None = None,
        folder: Path | None = None,
        reuse_prefix: bool = True,
        behind_final_norm: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is run yet; `measure` does that.

        Args:
            fitted: tensors that replace layers' own, by layer.
            batch_tokens: tokens of a forward pass; sensible for the device by default.
            memory_bytes: what hidden states may take in memory before they spill to disk, into `folder`.
            reuse_prefix: False runs the whole model for every change and candidate (for benchmarks).
            behind_final_norm: take the last layer's output behind the final norm, as published.
        """
        super().__init__(resident, ops, fitted)
        self.corpus = corpus
        self.stream = LayerStream(resident.model, resident.architecture)
        self.progress = progress or Silent()
        self.reuse_prefix = reuse_prefix
        self.behind_final_norm = behind_final_norm
        self.measures: list[LayerMeasure] = []
        self._measured: list[Layer] = []
        n, t = corpus.input_ids.shape
        self.batches = Batches(corpus, resident.device, batch_tokens=batch_tokens, progress=self.progress)
        self.room = Room(memory_bytes, folder)
        self.losses_N = torch.zeros(n, dtype=torch.float64)
        self.counts_N = torch.zeros(n, dtype=torch.int64)
        self.layer_forwards = 0.0
        self.hidden = HiddenStore((n, t, self.architecture.width), resident.model.dtype, room=self.room)
        self._distances: dict[tuple[int, int, str], float] = {}

    @property
    def loss(self) -> float:
        """Mean next-token loss on the calibration set, in nats."""
        return float(self.losses_N.sum() / self.counts_N.sum())

    @torch.inference_mode()
    def measure(self, start: int = 0, stop: int | None = None) -> None:
        """Run the layers from `start` on over the calibration set, and record measures, hidden states and loss.

        With `stop` only the layers before it are run, and the loss is not measured.
        """
        whole, stop = stop is None, self.depth if stop is None else stop
        if not self.measures or not self.reuse_prefix:
            start = 0
        del self.measures[start:], self._measured[start:]
        # What ended at the last layer before may have been taken behind the final norm.
        valid = start - 1 if self.behind_final_norm and start == self.depth else start
        self._distances = {key: value for key, value in self._distances.items() if key[0] + key[1] <= valid}
        n_batches = len(list(self.batches.over()))
        with self.progress.task(f"measuring {self.depth} layers", (stop - start + whole) * n_batches) as task:
            if start == 0:
                self.batches.each(self._enter)
            if self.behind_final_norm and whole and 0 < start == self.depth:
                self.measures[-1] = measuring.measure_new_last(self)
            for index, module in enumerate(self.resident.walk(self.modules[start:stop]), start):
                task.note(f"layer {index + 1} of {self.depth}")
                self.measures.append(measuring.measure_layer(self, index, module, task.advance))
            if whole:
                task.note("loss")
                measuring.measure_loss(self, task.advance)
        self._measured = list(zip(self.ops, self.fitted, strict=True))[:stop]

    def refresh(self) -> None:
        """Measure, from the first layer on that is another one than when it was last measured; nothing if none is.

        So methods that look at the same whole model, one after the other, share one pass over it.
        """
        same = 0
        for (op, fitted), now, now_fitted in zip(self._measured, self.ops, self.fitted, strict=False):
            if op != now or fitted is not now_fitted:
                break
            same += 1
        if same == len(self._measured) == self.depth:
            return
        # A last layer that was measured behind the final norm may be no last layer any more.
        self.measure(0 if self.behind_final_norm else same)

    def replace(self, start: int, count: int, op: Op | None, *, measure: bool = True) -> None:
        """Put one layer (or none) in the place of `count` layers, and re-run what lies behind."""
        ops = [] if op is None else [op]
        self.ops[start : start + count] = ops
        self.fitted[start : start + count] = [None] * len(ops)
        self.modules[start : start + count] = [self.resident.module(op) for op in ops]
        if measure:
            self.measure(start)

    @torch.inference_mode()
    def tokens_at(self, depth: int, keep_NT: Tensor) -> Tensor:
        """H^depth of the tokens where `keep_NT` is True: float32 `[K, D]`, on the CPU."""
        found = [self.hidden_at(depth, part).cpu()[keep_NT[part]].float() for part, _, _ in self.batches.over()]
        return torch.cat(found)

    @torch.inference_mode()
    def span_distance(self, start: int, count: int, tokens: Literal["all-tokens", "last-token"]) -> float:
        """SBI of the span of `count` layers from `start`: E[arccos(cos(H^start, H^{start+count}))] / pi."""
        key = (start, count, tokens)
        if key not in self._distances:
            self._distances[key] = measuring.distance(self, start, count, tokens)
        return self._distances[key]

    def close(self) -> None:
        """Free the hidden states."""
        self.hidden.close()

    def _enter(self, part: slice, ids: Tensor, mask: Tensor | None) -> None:
        self.hidden.put(0, part.start, self.stream.enter(ids, mask).h_BTD)

    def hidden_at(self, depth: int, part: slice) -> Tensor:
        """H^depth of some sequences, as it was measured."""
        return self.hidden.get(depth, part.start, part.stop, self.resident.device)

    def spend(self, layers: float, part: slice) -> None:
        """Count the cost of running that many layers on some sequences."""
        self.layer_forwards += layers * (part.stop - part.start) / self.corpus.input_ids.shape[0]
