"""The loop: the only code that runs layers over a text.

It runs one layer batch by batch from stored hidden states (`layer`), several layers with every state stored
(`through`), or whole paths of layers for their last state (`run`). It works alike for models in memory and streamed
ones, whose layers are read once for all paths, on one device or several, with or without gradients. It counts the
layer-forwards.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from intarsia.activations.batches import Batch, Batches
from intarsia.activations.hidden_store import HiddenStore, MemoryBudget
from intarsia.activations.loss import Likeliest
from intarsia.activations.statistics import output_projections, require_finite
from intarsia.activations.stream import LayerCall, LayerStream
from intarsia.architecture.spec import PARTS, Part
from intarsia.building.loaded_model import LoadedModel, Placed
from intarsia.data.corpus import Corpus

Read: TypeAlias = Callable[[slice], Tensor]
"""Reads the hidden states of some sequences, on the model's device."""

End: TypeAlias = Callable[[int, slice, Tensor, "Tensor | None", Tensor], None]
"""Receives the number of a path, the slice of sequences, their tokens, mask and H^L."""

_Given: TypeAlias = tuple[Batch, Tensor, LayerCall]
"""A batch, its hidden states before a layer, and the layer's other arguments."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A batch after a layer."""

    rows: slice
    ids: Tensor
    mask: Tensor | None
    # The residual stream before and after the layer.
    before: Tensor
    after: Tensor
    # The inputs of the layer's output projections, if they were requested.
    inputs: Mapping[Part, Tensor]
    # The result of `measure` on it.
    measured: Any = None


@dataclass(frozen=True, kw_only=True)
class Path:
    """Layers to run up to the head."""

    layers: Sequence[Placed]
    # The hidden states before the first of them; None: the embedding.
    read: Read | None = None


class Loop:
    """Runs layers over a text.

    Attributes:
        stream: the model, opened between its layers.
        batches: of the text, sized for the device.
        memory_budget: of the hidden states that the loop stores itself.
    """

    def __init__(self, resident: LoadedModel, batches: Batches, *, memory_budget: MemoryBudget | None = None) -> None:
        self.resident, self.batches, self.memory_budget = resident, batches, memory_budget or MemoryBudget()
        self.stream = LayerStream(resident.model, resident.architecture)
        self._spent = [0.0]  # layers times sequences; a list, to share it

    @property
    def corpus(self) -> Corpus:
        return self.batches.corpus

    @property
    def layer_forwards(self) -> float:
        """Cost so far; one layer over the whole text counts 1."""
        return self._spent[0] / len(self.corpus)

    def spend(self, layers: float, rows: slice) -> None:
        """Count the cost of running some layers on some sequences."""
        self._spent[0] += layers * (rows.stop - rows.start)

    def some(self, rows: Sequence[int]) -> Loop:
        """A loop over some sequences of the text, whose cost counts here too."""
        whole, index = self.corpus, list(rows)
        mask = None if whole.mask is None else whole.mask[index]
        corpus = Corpus.of(whole.input_ids[index], mask=mask, description=whole.description, documents=1)
        batches = Batches(corpus, self.resident.device, batch_tokens=self.batches.size * corpus.seq_len)
        other = Loop(self.resident, batches, memory_budget=self.memory_budget)
        other._spent = self._spent
        return other

    def store(self, sequences: int | None = None) -> HiddenStore:
        """An empty store for the hidden states of the text."""
        n, t = self.corpus.input_ids.shape
        shape = (n if sequences is None else sequences, t, self.stream.state.size)
        return HiddenStore(shape, self.resident.model.dtype, memory_budget=self.memory_budget)

    def embed(self, states: HiddenStore, depth: int = 0, *, sequences: slice = slice(None)) -> None:
        """Store the output of the embedding."""

        def work(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
            states.put(depth, rows.start, self.stream.enter(ids, mask).h_BTD)

        self.batches.each(work, sequences)

    def layer(
        self,
        layer: Placed,
        read: Read,
        then: Callable[[Passed], None],
        *,
        sequences: slice = slice(None),
        inputs: Sequence[Part] = (),
        measure: Callable[[Passed], Any] | None = None,
        name: str | None = None,
    ) -> None:
        """Run one layer (awake) from given hidden states.

        Args:
            then: receives the outputs, batch by batch; only it may have side effects.
            inputs: parts whose output projections' inputs are passed on too.
            measure: measures a batch, in any thread.
            name: of the layer's output, to refuse NaN and infinity in it; None: no check.

        Raises:
            UserError: the output is not finite, or memory is too small for one sequence.
        """

        def finish(batch: Batch, given: _Given, passed: Passed) -> None:
            then(passed)
            self.spend(1, passed.rows)

        with self._running(layer, read, inputs) as (prepare, run):

            def work(given: _Given) -> Passed:
                passed = run(given)
                if name is not None:
                    require_finite(passed.after, name)
                return passed if measure is None else replace(passed, measured=measure(passed))

            self.batches.side_by_side(prepare, work, finish, sequences)

    def outputs(
        self, layer: Placed, read: Read, *, sequences: slice = slice(None), inputs: Sequence[Part] = ()
    ) -> Iterator[Passed]:
        """One layer's outputs, batch by batch, for a caller that restarts with smaller batches if memory runs out
        (`Batches.whole`).

        Args:
            inputs: parts whose output projections' inputs are passed on too.
        """
        with self._running(layer, read, inputs) as (prepare, work):
            for _, _, passed in self.batches.results(prepare, work, sequences):
                self.spend(1, passed.rows)
                yield passed

    @contextmanager
    def _running(
        self, layer: Placed, read: Read, inputs: Sequence[Part]
    ) -> Iterator[tuple[Callable[[slice, Tensor, Tensor | None], _Given], Callable[[_Given], Passed]]]:
        """Functions that prepare a batch, and run one layer on it in any thread."""
        here = threading.local()

        def prepare(rows: slice, ids: Tensor, mask: Tensor | None) -> _Given:
            return (rows, ids, mask), read(rows), self.stream.calls(ids, mask)[layer.source]

        def run(given: _Given) -> Passed:
            (rows, ids, mask), before, call = given
            here.inputs = {}
            after = self.stream.run(layer.module, before, call)
            passed = Passed(rows=rows, ids=ids, mask=mask, before=before, after=after, inputs=here.inputs)
            here.inputs = None
            return passed

        def receive(part: Part, x: Tensor) -> None:
            inputs = getattr(here, "inputs", None)
            if inputs is not None:  # None while a caller runs the projection alone
                inputs[part] = x

        with output_projections(layer.module, self.resident.architecture, receive, inputs):
            yield prepare, run

    def through(
        self,
        layers: Sequence[Placed],
        states: HiddenStore,
        *,
        read: Read | None = None,
        at: Sequence[int] | None = None,
        measure: Callable[[int, Passed], Any] | None = None,
        observe: Callable[[int, Passed], None] | None = None,
        sequences: Sequence[slice] = (slice(None),),
        name: Callable[[int], str] = "output of layer {}".format,
    ) -> Iterator[int]:
        """Run layers one after the other, reading each once. Yield the number of every finished layer.

        Args:
            states: store to read and write hidden states.
            read: reads those before the first layer, if they are not in `states`.
            at: the depth in `states` before each layer and after the last; default: always 0, overwritten.
            measure: measures a batch of every layer, in any thread; it gets the inputs of output projections.
            observe: receives the outputs of every layer, batch by batch.
            sequences: parts of the text; no batch crosses their borders.
            name: gives the name of a layer's output, for errors.
        """
        depths = [0] * (len(layers) + 1) if at is None else at
        modules = self.resident.walk(layer.module for layer in layers)
        for number, (layer, _) in enumerate(zip(layers, modules, strict=True)):

            def then(passed: Passed, number: int = number) -> None:
                if observe is not None:
                    observe(number, passed)
                states.put(depths[number + 1], passed.rows.start, passed.after)

            source = read if read is not None and number == 0 else self.reader(states, depths[number])
            for part in sequences:
                own = None if measure is None else partial(measure, number)
                inputs = PARTS if measure else ()
                self.layer(layer, source, then, sequences=part, inputs=inputs, measure=own, name=name(number))
            yield number

    def reader(self, states: HiddenStore, depth: int = 0) -> Read:
        """A reader of one depth of a store."""
        return lambda rows: states.get(depth, rows.start, rows.stop, self.resident.device)

    def run(
        self,
        paths: Sequence[Path],
        end: End,
        *,
        sequences: slice = slice(None),
        advance: Callable[[float], None] = lambda layers: None,
    ) -> None:
        """Run paths to their ends.

        A model in memory runs one path after the other, batch by batch, and stores nothing. A streamed one reads each
        layer once for all paths that share it.

        Args:
            end: receives the outputs of a path, batch by batch.
            advance: called with the number of layers run, or the part of one by sequences.
        """
        if self.resident.streams:
            self._together(paths, end, sequences, advance)
            return
        for number, path in enumerate(paths):
            self._batch_by_batch(path, partial(end, number), sequences, advance)

    def losses(
        self,
        paths: Iterable[Path],
        *,
        sequences: slice = slice(None),
        expected: Callable[[slice], Likeliest] | None = None,
    ) -> Iterator[Tensor]:
        """The summed loss of each sequence at the end of each path in order: float64, on the CPU.

        Args:
            expected: gives another model's likeliest tokens of some sequences; the loss is then the KL from them.
        """
        for group in [list(paths)] if self.resident.streams else ([path] for path in paths):
            found: list[list[Tensor]] = [[] for _ in group]

            def end(
                number: int,
                rows: slice,
                ids: Tensor,
                mask: Tensor | None,
                h_BTD: Tensor,
                found: list[list[Tensor]] = found,
            ) -> None:
                likely = None if expected is None else expected(rows)
                found[number].append(self.stream.losses(h_BTD, ids, mask, expected=likely)[0])

            with torch.inference_mode():
                self.run(group, end, sequences=sequences)
            yield from map(torch.cat, found)

    @torch.inference_mode()
    def likeliest(self, path: Path, *, sequences: slice = slice(None)) -> Likeliest:
        """The likeliest next tokens at every position, at the end of a path."""
        found: list[Likeliest] = []

        def end(_: int, rows: slice, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
            found.append(self.stream.likeliest(h_BTD, ids, mask))

        self.run([path], end, sequences=sequences)
        return Likeliest(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _batch_by_batch(
        self,
        path: Path,
        end: Callable[[slice, Tensor, Tensor | None, Tensor], None],
        sequences: slice,
        advance: Callable[[float], None],
    ) -> None:
        def prepare(rows: slice, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Sequence[LayerCall]]:
            h_BTD = self.stream.enter(ids, mask).h_BTD if path.read is None else path.read(rows)
            return h_BTD, self.stream.calls(ids, mask)

        def work(given: tuple[Tensor, Sequence[LayerCall]]) -> Tensor:
            h_BTD, calls = given
            for layer in path.layers:
                h_BTD = self.stream.run(layer.module, h_BTD, calls[layer.source])
            return h_BTD

        def finish(batch: Batch, given: tuple[Tensor, Sequence[LayerCall]], h_BTD: Tensor) -> None:
            rows, ids, mask = batch
            end(rows, ids, mask, h_BTD)
            self.spend(len(path.layers), rows)
            advance(len(path.layers) * (rows.stop - rows.start) / len(self.corpus))

        self.batches.side_by_side(prepare, work, finish, sequences)

    def _together(self, paths: Sequence[Path], end: End, sequences: slice, advance: Callable[[float], None]) -> None:
        start, stop, _ = sequences.indices(len(self.corpus))
        states = self.store(stop - start)
        started: set[int] = set()  # paths with a complete stored state

        def read(number: int, rows: slice) -> Tensor:
            if number in started:
                return states.get(number, rows.start - start, rows.stop - start, self.resident.device)
            first = paths[number].read
            assert first is not None
            return first(rows)

        def put(number: int, passed: Passed) -> None:
            states.put(number, passed.rows.start - start, passed.after)
            advance((passed.rows.stop - passed.rows.start) / len(self.corpus))

        try:
            for number, path in enumerate(paths):
                if path.read is None:
                    self.batches.each(
                        lambda rows, ids, mask, number=number: states.put(  # type: ignore[misc]
                            number, rows.start - start, self.stream.enter(ids, mask).h_BTD
                        ),
                        sequences,
                    )
                    started.add(number)
            steps = _meetings(paths)
            modules = self.resident.walk(layer.module for layer, _ in steps)
            for (layer, numbers), _ in zip(steps, modules, strict=True):
                for number in numbers:
                    self.layer(layer, partial(read, number), partial(put, number), sequences=sequences)
                    started.add(number)
            for number in range(len(paths)):
                self.batches.each(
                    lambda rows, ids, mask, number=number: end(  # type: ignore[misc]
                        number, rows, ids, mask, read(number, rows)
                    ),
                    sequences,
                )
                states.drop(number)
        finally:
            states.close()


def _meetings(paths: Sequence[Path]) -> list[tuple[Placed, list[int]]]:
    """Every layer to run, in order, with the numbers of the paths that share it."""
    found: list[tuple[Placed, list[int]]] = []
    for left in range(max(len(path.layers) for path in paths), 0, -1):
        meeting: dict[Placed, list[int]] = {}
        for number, path in enumerate(paths):
            if left <= len(path.layers):
                meeting.setdefault(path.layers[-left], []).append(number)
        found += meeting.items()
    return found
