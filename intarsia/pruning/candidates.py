"""What the model would be with other layers in the place of some: run from the kept hidden states before them.

The model itself does not change; the layers that are run are counted as its cost. Of a model that is streamed a layer
is read once for all changes that are judged together; else one change is run after the other, which needs no room.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from intarsia.activations.hidden_store import HiddenStore
from intarsia.pruning.intermediate import Intermediate
from intarsia.recipe.ops import Op

_Receive: TypeAlias = Callable[[int, Tensor, "Tensor | None", Tensor], None]
"""Takes which change it is, and tokens, mask and H^L of a batch."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """`ops` stand in the place of the `count` layers from `start` on."""

    start: int
    count: int
    ops: tuple[Op, ...]


def losses_with(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], *, sequences: slice = slice(None)
) -> Tensor:
    """Summed loss of each sequence if `ops` stood in the place of `count` layers: float64, `[N]` of the slice."""
    return next(losses_of(model, [Change(start=start, count=count, ops=tuple(ops))], sequences=sequences))


def losses_of(model: Intermediate, changes: Sequence[Change], *, sequences: slice = slice(None)) -> Iterator[Tensor]:
    """`losses_with` of one change after the other."""
    for group in [changes] if model.resident.streams else [[change] for change in changes]:
        found: list[list[Tensor]] = [[] for _ in group]

        def receive(
            number: int, ids: Tensor, mask: Tensor | None, h_BTD: Tensor, found: list[list[Tensor]] = found
        ) -> None:
            found[number].append(model.stream.losses(h_BTD, ids, mask)[0])

        _run(model, group, sequences, receive)
        yield from map(torch.cat, found)


def normed_with(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], *, sequences: slice = slice(None)
) -> Tensor:
    """What the head would read if `ops` stood in the place of `count` layers: H^L behind the final norm.

    Returns:
        `[N, T, D]` of the slice, in the model's dtype, on the CPU. Padding is zero.
    """
    change = Change(start=start, count=count, ops=tuple(ops))
    found: list[Tensor] = []

    def receive(number: int, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
        normed = model.stream.final_norm(h_BTD, ids, mask)
        found.append((normed if mask is None else normed.masked_fill(~mask[..., None], 0.0)).cpu())

    _run(model, [change], sequences, receive)
    return torch.cat(found)


@torch.inference_mode()
def _run(model: Intermediate, changes: Sequence[Change], sequences: slice, receive: _Receive) -> None:
    if model.resident.streams and model.reuse_prefix:
        _Together(model, changes, sequences).run(receive)
        return
    for number, change in enumerate(changes):
        _batch_by_batch(model, number, change, sequences, receive)


def _batch_by_batch(model: Intermediate, number: int, change: Change, sequences: slice, receive: _Receive) -> None:
    chain = list(zip(model.ops, model.modules, strict=True))
    chain[change.start : change.start + change.count] = [(op, model.resident.module(op)) for op in change.ops]
    first = change.start if model.reuse_prefix else 0

    def work(part: slice, ids: Tensor, mask: Tensor | None) -> None:
        h_BTD = model.hidden_at(first, part) if model.reuse_prefix else model.stream.enter(ids, mask).h_BTD
        calls = model.stream.calls(ids, mask)
        for op, module in chain[first:]:
            h_BTD = model.stream.run(module, h_BTD, calls[op.sources[0].layer])
        receive(number, ids, mask, h_BTD)
        model.spend(len(chain) - first, part)

    model.batches.each(work, sequences)


class _Together:
    """Several changes on their way through the layers: a layer runs for all of them before the next one is read."""

    def __init__(self, model: Intermediate, changes: Sequence[Change], sequences: slice) -> None:
        self.model, self.changes, self.sequences = model, changes, sequences
        self.first, stop, _ = sequences.indices(len(model.corpus))
        shape = (stop - self.first, model.corpus.seq_len, model.architecture.width)
        self.states = HiddenStore(shape, model.resident.model.dtype, room=model.room)
        self.begun: set[int] = set()

    def run(self, receive: _Receive) -> None:
        """Run them all."""
        model, path = self.model, _path(self.model, self.changes)
        try:
            modules = model.resident.walk([module for _, _, module in path])
            for (numbers, op, _), module in zip(path, modules, strict=True):
                for number in numbers:
                    self._through(number, op, module)
            for number in range(len(self.changes)):
                self._receive(number, receive)
                self.states.drop(number)
        finally:
            self.states.close()

    def _through(self, number: int, op: Op, module: nn.Module) -> None:
        def work(part: slice, ids: Tensor, mask: Tensor | None) -> None:
            call = self.model.stream.calls(ids, mask)[op.sources[0].layer]
            h_BTD = self.model.stream.run(module, self._state(number, part), call)
            self.states.put(number, part.start - self.first, h_BTD)
            self.model.spend(1, part)

        self.model.batches.each(work, self.sequences)
        self.begun.add(number)

    def _receive(self, number: int, receive: _Receive) -> None:
        def work(part: slice, ids: Tensor, mask: Tensor | None) -> None:
            receive(number, ids, mask, self._state(number, part))

        self.model.batches.each(work, self.sequences)

    def _state(self, number: int, part: slice) -> Tensor:
        if number not in self.begun:
            return self.model.hidden_at(self.changes[number].start, part)
        device = self.model.resident.device
        return self.states.get(number, part.start - self.first, part.stop - self.first, device)


def _path(model: Intermediate, changes: Sequence[Change]) -> list[tuple[list[int], Op, nn.Module]]:
    """Every layer that is run, in order: for which changes, what it is made of, and itself."""
    path: list[tuple[list[int], Op, nn.Module]] = []
    for index in range(min(change.start for change in changes), model.depth):
        for number, change in enumerate(changes):
            if change.start == index:
                path += [([number], op, model.resident.module(op)) for op in change.ops]
        behind = [number for number, change in enumerate(changes) if change.start + change.count <= index]
        if behind:
            path.append((behind, model.ops[index], model.modules[index]))
    return path
