"""What is measured on one layer of the model in the middle of pruning, and between two depths of it.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.activations.hidden_store import HiddenStore, Room
from intarsia.activations.hooks import read_outs
from intarsia.activations.loop import Batches
from intarsia.activations.statistics import LayerMeasure, cosines, last_real, require_finite
from intarsia.activations.stream import LayerStream
from intarsia.architecture.spec import Part
from intarsia.building.loaded_model import Resident
from intarsia.data.corpus import Corpus
from intarsia.healing.teacher import TeacherStates
from intarsia.progress import Progress, Silent
from intarsia.pruning.scores import angular_distance
from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.recipe.recipe import Fitted


def measure_layer(model: Measured, index: int, module: nn.Module, advance: Callable[[], None]) -> LayerMeasure:
    """Run a layer (awake) from the hidden states before it; those behind it are kept."""
    measure = LayerMeasure()
    source = model.ops[index].sources[0].layer

    def work(part: slice, ids: Tensor, mask: Tensor | None) -> None:
        before = model.hidden_at(index, part)
        inputs: list[tuple[Part, Tensor]] = []
        with read_outs(module, model.architecture, lambda where, x: inputs.append((where, x))):
            behind = model.stream.run(module, before, model.stream.calls(ids, mask)[source])
        require_finite(behind, f"output of layer {index}")
        normed = behind
        if model.behind_final_norm and index + 1 == model.depth:
            normed = model.stream.final_norm(behind, ids, mask)
        found = LayerMeasure()
        found.add_stream(before, normed.to(before.device), mask)
        for where, x in inputs:
            found.channels[where].add(x, None if mask is None else mask.to(x.device))
        model.hidden.put(index + 1, part.start, behind)
        measure.include(found)
        model.spend(1, part)
        advance()

    model.batches.each(work)
    return measure


def measure_new_last(model: Measured) -> LayerMeasure:
    """The influence of a layer that has become the last one: its output now counts behind the final norm."""
    fresh = LayerMeasure(channels=model.measures[-1].channels)
    for part, ids, mask in model.batches.over():
        behind = output(model, model.depth, part, ids, mask)
        fresh.add_stream(model.hidden_at(model.depth - 1, part), behind, mask)
    return fresh


def measure_loss(model: Measured, advance: Callable[[], None]) -> None:
    """The loss of every sequence, from the hidden states behind the last layer."""

    def work(part: slice, ids: Tensor, mask: Tensor | None) -> None:
        model.losses_N[part], model.counts_N[part] = model.stream.losses(model.hidden_at(model.depth, part), ids, mask)
        advance()

    model.batches.each(work)


def distance(model: Measured, start: int, count: int, tokens: Literal["all-tokens", "last-token"]) -> float:
    """E[arccos(cos(H^start, H^{start+count}))] / pi."""
    total, number = 0.0, 0
    for part, ids, mask in model.batches.over():
        before = model.hidden_at(start, part)
        behind = output(model, start + count, part, ids, mask)
        keep = last_real(ids, mask) if tokens == "last-token" else mask
        found = angular_distance(cosines(before, behind, keep))
        total, number = total + float(found.sum()), number + found.numel()
    return total / number


def output(model: Measured, depth: int, part: slice, ids: Tensor, mask: Tensor | None) -> Tensor:
    """H^depth of some sequences; of the last layer behind the final norm, where that is wanted."""
    h_BTD = model.hidden_at(depth, part)
    if model.behind_final_norm and depth == model.depth:
        return model.stream.final_norm(h_BTD, ids, mask)
    return h_BTD


Tensors: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""What is fitted on a layer, by name inside it."""

Layer: TypeAlias = tuple[Op, Tensors | None]


class CurrentLayers:
    """Layers that can be exchanged; nothing is run.

    Attributes:
        ops: what each current layer is made of.
        fitted: what is fitted on each current layer, or None.
        modules: the current layer modules.
    """

    def __init__(self, resident: Resident, ops: Sequence[Op], fitted: Fitted | None) -> None:
        """
        Args:
            fitted: tensors that replace layers' own, by layer.
        """
        self.resident = resident
        self.architecture = resident.architecture
        self.become(ops, fitted)

    @property
    def depth(self) -> int:
        """Current number of layers."""
        return len(self.ops)

    def become(self, ops: Sequence[Op], fitted: Fitted | None = None) -> None:
        """Be made of other layers from now on; nothing is run."""
        self.ops = list(ops)
        self.fitted: list[Tensors | None] = [(fitted or {}).get(index) or None for index in range(len(ops))]
        self.modules = [self.resident.module(op, own) for op, own in zip(self.ops, self.fitted, strict=True)]

    def fit(self, index: int, fitted: Tensors | None, module: nn.Module | None = None) -> None:
        """Have these tensors, or none, on a layer (`module` with them, where there is one); nothing is run."""
        if fitted is not self.fitted[index]:
            self.fitted[index] = fitted
            # A module at rest takes no memory, which one with values does.
            keep = module if not self.resident.streams else None
            self.modules[index] = keep or self.resident.module(self.ops[index], fitted)


def is_whole(layers: Sequence[Layer], n_layers: int) -> bool:
    """Whether these are all layers of the original, in order, as they were."""
    return len(layers) == n_layers and all(
        isinstance(op, Select) and op.source.layer == index and fitted is None
        for index, (op, fitted) in enumerate(layers)
    )


def original_ops(layers: Sequence[Op], n_layers: int) -> list[Op]:
    """All layers of the original that these are made of, in order."""
    variant = layers[0].sources[0].variant
    return [Select(source=LayerRef(variant=variant, layer=layer)) for layer in range(n_layers)]


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
                self.measures[-1] = measure_new_last(self)
            for index, module in enumerate(self.resident.walk(self.modules[start:stop]), start):
                task.note(f"layer {index + 1} of {self.depth}")
                self.measures.append(measure_layer(self, index, module, task.advance))
            if whole:
                task.note("loss")
                measure_loss(self, task.advance)
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
            self._distances[key] = distance(self, start, count, tokens)
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


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is measured on a model, beside its hidden states."""

    layers: list[Layer]
    measures: list[LayerMeasure]
    losses_N: Tensor
    distances: dict[tuple[int, int, str], float]


class Intermediate(Measured):
    """The current layers with what is measured on them, which can be kept and come back to.

    The original's hidden states are shared, where they are there.
    """

    _kept: _Kept | None = None
    _original: TeacherStates | None = None
    _held_original = False

    def keep(self) -> None:
        """Keep what is measured now: `rewind` comes back to it, whatever is measured in between.

        So methods that change the model, one after the other, share one pass over the whole one.
        """
        self._hold()
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
        self.become([op for op, _ in self._kept.layers])
        for index, (_, fitted) in enumerate(self._kept.layers):
            self.fit(index, fitted)

    def original(self, sequences: int) -> TeacherStates:
        """The hidden states of the original on so many sequences, kept from now on.

        They are those that were measured, where the whole model is what was kept or measured last, and else cost a
        layer-forward for each layer.
        """
        if self._original is None or self._original.sequences < sequences:
            if self._original is not None:
                self._original.close()
            self._original = self._known_original(sequences)
            self._original.learn(range(self.architecture.n_layers + 1))
            self.spend(self._original.cost, slice(0, sequences))
        return self._original

    def beside(self, original: TeacherStates) -> Intermediate:
        """Another one, made of the original's layers and with its hidden states on the whole text; nothing is run."""
        other = Intermediate(
            self.resident, self.corpus, original_ops(self.ops, self.architecture.n_layers), progress=self.progress
        )
        other.batches, other.room, other.counts_N = self.batches, self.room, self.counts_N
        other.hidden = HiddenStore(self.hidden.shape, self.hidden.dtype, room=self.room, held=original.states)
        return other

    def close(self) -> None:
        """Free the hidden states, the original's with them."""
        if self._original is not None:
            self._original.close()
        super().close()

    def _known_original(self, sequences: int) -> TeacherStates:
        """The original with what is measured of it."""
        measured = self._is_original()
        if measured and self.hidden.held is None and sequences == len(self.corpus):
            self._hold()
        if self._held_original:
            return TeacherStates(self.resident, self.batches, sequences=sequences, known=self.hidden.held)
        original = TeacherStates(
            self.resident, self.batches, sequences=sequences, room=self.room, progress=self.progress
        )
        if measured:
            original.copy(self.hidden)
        return original

    def _hold(self) -> None:
        """Keep the hidden states that are there; those that are measured later are stored besides."""
        self.hidden.hold()
        self._held_original = self._is_original()

    def _is_original(self) -> bool:
        """Whether what was measured last is the whole model as it was."""
        return is_whole(self._measured, self.architecture.n_layers)
