"""Runs batches through a recipe's layers, from the deepest state that is known already.

The unit of cost is a layer-forward over one token; `Run.work` counts them. What the model makes of a batch before its
first layer (embedding, masks, rotary embeddings) is kept too, in a cache with a bound in bytes.

Shapes: B rows, T columns, N positions with logits, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.calibration.stream import Entry, LayerStream
from intarsia.evaluation.likelihood import Rows
from intarsia.evaluation.run_rows import inputs_of
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.byte_cache import ByteCache, bytes_of
from intarsia.tailoring.prefixes import Prefixes, path_of
from intarsia.tailoring.resident_family import ResidentFamily


class Runner:
    """Runs recipes on batches, one recipe after the other.

    Attributes:
        layers: makes their layers.
        prefixes: states behind the first layers of earlier recipes.
        work: layer-forwards times tokens of the present recipe so far.
    """

    def __init__(self, layers: ResidentFamily, *, prefix_bytes: int, entry_bytes: int) -> None:
        self.layers = layers
        self.model = layers.resident.model
        self.device = layers.resident.device
        self.stream = LayerStream(self.model, layers.resident.architecture)
        self.prefixes = Prefixes(prefix_bytes)
        self.work = 0
        self._entries: ByteCache[Hashable, Entry] = ByteCache(entry_bytes)
        self._recipe: Recipe | None = None
        self._modules: dict[int, nn.Module] = {}

    def begin(self, recipe: Recipe, path: tuple[str, ...] | None = None, *, tokens: int) -> None:
        """The batches that follow are for this recipe.

        Args:
            path: of the recipe, where it is known.
            tokens: of all batches, with padding.
        """
        self._recipe, self._modules, self.work = recipe, {}, 0
        depth_bytes = tokens * self.layers.resident.architecture.width * self.model.dtype.itemsize
        self.prefixes.begin(path or path_of(recipe), depth_bytes)

    def end(self) -> None:
        """Let go of the recipe's layers that are in no cache."""
        self._recipe, self._modules = None, {}

    def clear(self) -> None:
        """Let go of everything that can be made again."""
        self.end()
        self.prefixes.clear()
        self._entries.clear()
        self.layers.clear()

    def logits(self, batch: Hashable, rows: Rows) -> Tensor:
        """The `[N, V]` logits that rows want. `batch` says which rows these are."""
        h_BTD = self._states(batch, rows)
        h_N1D = h_BTD[rows.row_N.to(self.device), rows.column_N.to(self.device)][:, None]
        # Final norm and head look at one position at a time, so that each wanted position may be a row of its own.
        ids_N1 = torch.zeros(h_N1D.shape[:2], dtype=torch.int64, device=self.device)
        return self.stream.logits(h_N1D, ids_N1, None)[:, 0]

    def entry(self, batch: Hashable, rows: Rows) -> Entry:
        """What the model makes of rows before its first layer."""
        entry = self._entries.get(batch)
        if entry is None:
            entry = self.stream.enter_with(inputs_of(self.model, rows))
            tensors = {id(tensor): tensor for tensor in _tensors([entry.h_BTD, *entry.calls])}
            self._entries.put(batch, entry, sum(map(bytes_of, tensors.values())))
        return entry

    def _states(self, batch: Hashable, rows: Rows) -> Tensor:
        """The residual stream behind the last layer."""
        assert self._recipe is not None, "between begin and end"
        entry = self.entry(batch, rows)
        depth, known = self.prefixes.deepest(batch)
        h_BTD = entry.h_BTD if known is None else known
        for index in range(depth, len(self._recipe.layers)):
            source = self._recipe.layers[index].sources[0].layer
            h_BTD = self.stream.run(self._module(index), h_BTD, entry.calls[source])
            self.prefixes.keep(index + 1, batch, h_BTD)
            self.work += rows.ids_BT.numel()
        return h_BTD

    def _module(self, index: int) -> nn.Module:
        assert self._recipe is not None, "between begin and end"
        if index not in self._modules:
            self._modules[index] = self.layers.module(self._recipe.layers[index], self._recipe.fitted.get(index))
        return self._modules[index]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in arguments of layers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif hasattr(value, "kwargs"):
        yield from _tensors([*value.args, *value.kwargs.values()])
