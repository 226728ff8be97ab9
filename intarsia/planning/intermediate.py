"""The model as it is in the middle of progressive pruning, with everything that is measured on it.

Hidden states are kept at every depth, so a change re-runs only the layers behind it, and a candidate is judged from
the hidden states in front of it (`intarsia.planning.candidates`). The unit of cost is a layer-forward over the
calibration set.

Shape suffixes: `N` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import LayerMeasure, cosines, last_real, require_finite
from intarsia.calibration.stream import LayerStream
from intarsia.calibration.taps import read_outs
from intarsia.planning.original import Original
from intarsia.planning.scores import angular_distance
from intarsia.progress import Progress, Silent
from intarsia.recipe.ops import Op, Select
from intarsia.recipe.recipe import Fitted

_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 32768

Tensors: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""What is fitted on a layer, by name inside it."""

_Layer: TypeAlias = tuple[Op, Tensors | None]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is measured on a model, beside its hidden states."""

    layers: list[_Layer]
    measures: list[LayerMeasure]
    losses_N: Tensor
    distances: dict[tuple[int, int, str], float]


class Intermediate:
    """The current layers, their measures and hidden states.

    Attributes:
        ops: what each current layer is made of.
        fitted: what is fitted on each current layer, or None.
        modules: the current layer modules.
        measures: what each current layer does on the calibration set.
        losses_N: summed next-token loss of each sequence, in nats; `counts_N` the tokens predicted in it.
        layer_forwards: cost so far; a layer run on the whole calibration set once counts 1.
        errors: what `reconstruction_error` found, by where, towards which depth and of what layer, while it is true.
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
        reuse_prefix: bool = True,
        behind_final_norm: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is run yet; `measure` does that.

        Args:
            fitted: tensors that replace layers' own, by layer.
            batch_tokens: tokens of a forward pass; sensible for the device by default.
            memory_bytes: what hidden states may take in memory before they spill to disk.
            reuse_prefix: False runs the whole model for every change and candidate (for benchmarks).
            behind_final_norm: take the last layer's output behind the final norm, as published.
        """
        self.resident = resident
        self.anatomy = resident.anatomy
        self.corpus = corpus
        self.stream = LayerStream(resident.model, resident.anatomy)
        self.progress = progress or Silent()
        self.reuse_prefix = reuse_prefix
        self.behind_final_norm = behind_final_norm
        self.become(ops, fitted)
        self.measures: list[LayerMeasure] = []
        self._measured: list[_Layer] = []
        n, t = corpus.input_ids.shape
        default = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
        self.batch = max(1, (batch_tokens or default) // t)
        self.losses_N = torch.zeros(n, dtype=torch.float64)
        self.counts_N = torch.zeros(n, dtype=torch.int64)
        self.layer_forwards = 0.0
        self.hidden = HiddenStore((n, t, self.anatomy.width), resident.model.dtype, memory_bytes=memory_bytes)
        self.errors: dict[tuple[int, int, Op], float] = {}
        self._distances: dict[tuple[int, int, str], float] = {}
        self._kept: _Kept | None = None
        self._original: Original | None = None

    @property
    def depth(self) -> int:
        """Current number of layers."""
        return len(self.ops)

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
        self.errors = {key: value for key, value in self.errors.items() if key[0] <= start}
        n_batches = len(list(self._slices()))
        with self.progress.task(f"measuring {self.depth} layers", (stop - start + whole) * n_batches) as task:
            if start == 0:
                for part, ids, mask in self.batches():
                    self.hidden.put(0, part.start, self.stream.enter(ids, mask).h_BTD)
            if self.behind_final_norm and whole and 0 < start == self.depth:
                self._measure_new_last()
            for index in range(start, stop):
                task.note(f"layer {index + 1} of {self.depth}")
                self.measures.append(self._measure_layer(index, task.advance))
            for part, ids, mask in self.batches() if whole else ():
                task.note("loss")
                self.losses_N[part], self.counts_N[part] = self.stream.losses(
                    self.hidden_at(self.depth, part), ids, mask
                )
                task.advance()
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

    def keep(self) -> None:
        """Keep what is measured now: `rewind` comes back to it, whatever is measured in between.

        So methods that change the model, one after the other, share one pass over the whole one. Hidden states that are
        measured later are stored besides.
        """
        self.hidden.hold()
        self._kept = _Kept(
            layers=list(self._measured),
            measures=list(self.measures),
            losses_N=self.losses_N.clone(),
            distances=dict(self._distances),
        )

    def rewind(self) -> None:
        """Be what it was at `keep` again; nothing is run."""
        assert self._kept is not None, "nothing was kept"
        self.hidden.restore()
        self.measures, self._measured = list(self._kept.measures), list(self._kept.layers)
        self.losses_N, self._distances = self._kept.losses_N.clone(), dict(self._kept.distances)
        self.errors.clear()
        self.become([op for op, _ in self._kept.layers])
        for index, (_, fitted) in enumerate(self._kept.layers):
            self.fit(index, fitted)

    def become(self, ops: Sequence[Op], fitted: Fitted | None = None) -> None:
        """Be made of other layers from now on; nothing is run."""
        self.ops = list(ops)
        self.fitted: list[Tensors | None] = [(fitted or {}).get(index) or None for index in range(len(ops))]
        self.modules = [self.resident.module(op, own) for op, own in zip(self.ops, self.fitted, strict=True)]

    def fit(self, index: int, fitted: Tensors | None, module: nn.Module | None = None) -> None:
        """Have these tensors, or none, on a layer (`module` with them, where there is one); nothing is run."""
        if fitted is not self.fitted[index]:
            self.fitted[index] = fitted
            self.modules[index] = module or self.resident.module(self.ops[index], fitted)

    def replace(self, start: int, count: int, op: Op | None, *, measure: bool = True) -> None:
        """Put one layer (or none) in the place of `count` layers, and re-run what lies behind."""
        ops = [] if op is None else [op]
        self.ops[start : start + count] = ops
        self.fitted[start : start + count] = [None] * len(ops)
        self.modules[start : start + count] = [self.resident.module(op) for op in ops]
        if measure:
            self.measure(start)

    def original(self, sequences: int) -> Original:
        """The hidden states of the original on so many sequences, kept from now on.

        They are copied where the whole model is what was measured last, and else cost a layer-forward for each layer.
        """
        if self._original is None or self._original.sequences < sequences:
            if self._original is not None:
                self._original.close()
            # Hidden states of the model itself come first.
            left = self.hidden.memory_bytes - (self.anatomy.n_layers + 1) * self.hidden.depth_bytes
            self._original = Original(self.resident, self.corpus, sequences=sequences, memory_bytes=max(0, left))
            if self._is_original():
                self._original.copy(self.hidden)
            else:
                self._original.run(self.stream, batch=self.batch)
                self.spend(self.anatomy.n_layers, slice(0, sequences))
        return self._original

    def _is_original(self) -> bool:
        """Whether what was measured last is the whole model as it was."""
        return len(self._measured) == self.anatomy.n_layers and all(
            isinstance(op, Select) and op.source.layer == index and fitted is None
            for index, (op, fitted) in enumerate(self._measured)
        )

    @torch.inference_mode()
    def tokens_at(self, depth: int, keep_NT: Tensor) -> Tensor:
        """H^depth of the tokens where `keep_NT` is True: float32 `[K, D]`, on the CPU."""
        found = [self.hidden_at(depth, part).cpu()[keep_NT[part]].float() for part, _, _ in self.batches()]
        return torch.cat(found)

    @torch.inference_mode()
    def span_distance(self, start: int, count: int, tokens: Literal["all-tokens", "last-token"]) -> float:
        """SBI of the span of `count` layers from `start`: E[arccos(cos(H^start, H^{start+count}))] / pi."""
        key = (start, count, tokens)
        if key not in self._distances:
            total, number = 0.0, 0
            for part, ids, mask in self.batches():
                before = self.hidden_at(start, part)
                behind = self._output(start + count, part, ids, mask)
                keep = last_real(ids, mask) if tokens == "last-token" else mask
                distance = angular_distance(cosines(before, behind, keep))
                total, number = total + float(distance.sum()), number + distance.numel()
            self._distances[key] = total / number
        return self._distances[key]

    def close(self) -> None:
        """Free the hidden states."""
        self.hidden.close()
        if self._original is not None:
            self._original.close()

    def _measure_layer(self, index: int, advance: Callable[[], None]) -> LayerMeasure:
        measure = LayerMeasure()
        module, source = self.modules[index], self.ops[index].sources[0].layer
        for part, ids, mask in self.batches():
            before = self.hidden_at(index, part)

            def receive(where: Literal["attention", "mlp"], x: Tensor, keep: Tensor | None = mask) -> None:
                measure.channels[where].add(x, keep)

            with read_outs(module, self.anatomy, receive):
                behind = self.stream.run(module, before, self.stream.calls(ids, mask)[source])
            require_finite(behind, f"output of layer {index}")
            self.hidden.put(index + 1, part.start, behind)
            self.spend(1, part)
            if self.behind_final_norm and index + 1 == self.depth:
                behind = self.stream.final_norm(behind, ids, mask)
            measure.add_stream(before, behind, mask)
            advance()
        return measure

    def _measure_new_last(self) -> None:
        """The influence of a layer that has become the last one: its output now counts behind the final norm."""
        fresh = LayerMeasure(channels=self.measures[-1].channels)
        for part, ids, mask in self.batches():
            behind = self._output(self.depth, part, ids, mask)
            fresh.add_stream(self.hidden_at(self.depth - 1, part), behind, mask)
        self.measures[-1] = fresh

    def _output(self, depth: int, part: slice, ids: Tensor, mask: Tensor | None) -> Tensor:
        h_BTD = self.hidden_at(depth, part)
        if self.behind_final_norm and depth == self.depth:
            return self.stream.final_norm(h_BTD, ids, mask)
        return h_BTD

    def hidden_at(self, depth: int, part: slice) -> Tensor:
        """H^depth of some sequences, as it was measured."""
        return self.hidden.get(depth, part.start, part.stop, self.resident.device)

    def spend(self, layers: float, part: slice) -> None:
        """Count the cost of running that many layers on some sequences."""
        self.layer_forwards += layers * (part.stop - part.start) / self.corpus.input_ids.shape[0]

    def _slices(self, sequences: slice = slice(None)) -> Iterator[slice]:
        start, stop, _ = sequences.indices(self.corpus.input_ids.shape[0])
        for first in range(start, stop, self.batch):
            yield slice(first, min(first + self.batch, stop))

    def batches(self, sequences: slice = slice(None)) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The calibration set batch by batch: which sequences, their tokens, and where these are real (None: all)."""
        for part in self._slices(sequences):
            mask = self.corpus.mask
            yield (
                part,
                self.corpus.input_ids[part].to(self.resident.device),
                None if mask is None else mask[part].to(self.resident.device),
            )
