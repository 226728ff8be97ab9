"""The layers of a family in memory, each tensor once, and the work that trials share.

The base is loaded as a model. A whole layer of a full checkpoint is a module on tensors mapped from its file; a layer
of an adapter shares the tensors that the adapter does not change with the base. Merged layers, and layers of an
adapter, are made when they are first needed and stay in a cache of limited size.

A layer's tensors equal those of the built and loaded folder: made from the files' tensors, rounded to the files' dtype,
then cast to the dtype of the run. Hidden states after shared first layers are kept too, in a cache that evicts the
least recently used.

Shapes: B sequences, T tokens, D residual width, N positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.activations.batches import side_by_side, workers_for
from intarsia.activations.stream import Entry, LayerStream
from intarsia.building.layer import tensor_names
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.building.offload import set_parameter
from intarsia.evaluation.likelihood import Rows, inputs_of
from intarsia.recipe.recipe import LayerRef, Op, Recipe, Select
from intarsia.tailoring.family import Family

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Fitted = Mapping[str, npt.NDArray[np.float32]]

_PATHS = 4  # paths whose states must fit


class TrialFailed(Exception):
    """A candidate that could not be scored: NaN, or not enough memory. It is not a bad score."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class ByteCache(Generic[K, V]):
    """Values by key, at most `limit` bytes; the least recently used are evicted first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, now the most recently used; None if there is none."""
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Store a value, and evict the oldest ones; one larger than the whole cache is not stored."""
        if key in self._held:
            self.nbytes -= self._held.pop(key)[1]
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self.nbytes -= self._held.popitem(last=False)[1][1]
        self._held[key] = (value, nbytes)
        self.nbytes += nbytes

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()
        self.nbytes = 0


def layer_key(op: Op, fitted: Fitted | None = None) -> str:
    """A key that is the same for layers with equal tensors and arguments, within one family."""
    digest = hashlib.sha256(f"{type(op).__name__} {json.dumps(asdict(op), sort_keys=True)}".encode())
    for name, array in sorted((fitted or {}).items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def path_of(recipe: Recipe) -> tuple[str, ...]:
    """A key after every layer of a recipe, the same for recipes that are equal up to there."""
    found: list[str] = []
    for index, op in enumerate(recipe.layers):
        before = found[-1] if found else ""
        found.append(hashlib.sha256(f"{before}/{layer_key(op, recipe.fitted.get(index))}".encode()).hexdigest())
    return tuple(found)


class FamilyModel(LoadedModel):
    """A family's base as a model, and layer modules for any op over the family; `made` counts the modules made."""

    def __init__(self, family: Family, *, device: torch.device, dtype: torch.dtype | None, memory_bytes: int) -> None:
        """Load the base, and limit the memory for made modules."""
        self.base, *others = family.names
        checkpoints = family.checkpoints()
        beside = {name: checkpoints[name] for name in others}
        super().__init__(checkpoints[self.base], device=device, dtype=dtype, others=beside)
        self.made = 0
        self._modules: ByteCache[str, nn.Module] = ByteCache(memory_bytes)

    def module(self, op: Op, fitted: Fitted | None = None) -> nn.Module:
        """The layer that an op describes; `fitted` tensors replace the op's own, by name inside the layer."""
        if isinstance(op, Select) and op.source.variant not in self.others and not fitted:
            return self.layers[op.source.layer]
        key = layer_key(op, fitted)
        module = self._modules.get(key)
        if module is None:
            module, nbytes = self._new(op, fitted or {})
            self._modules.put(key, module, nbytes)
            self.made += 1
        return module

    def clear(self) -> None:
        """Drop all made modules."""
        self._modules.clear()

    def _new(self, op: Op, fitted: Fitted) -> tuple[nn.Module, int]:
        """A new module, and its bytes that are not shared with the base."""
        parameters = self._made(op, fitted)
        original = self.layers[op.sources[0].layer]
        module, own = twin(original), 0
        for name, parameter in list(original.named_parameters()):
            stored = tensor_names(name, self.architecture)
            if isinstance(op, Select) and all(self._is_base(op.source, part) and part not in fitted for part in stored):
                continue
            if not bool(parameters[name].isfinite().all()):
                sources = ", ".join(map(str, op.sources))
                raise TrialFailed(f"{name} of the layer made from {sources} is NaN or infinite")
            tensor = parameters[name].to(device=self.device, dtype=parameter.dtype)
            set_parameter(module, name, tensor)
            own += tensor.nbytes
        return module.eval(), own

    def _is_base(self, ref: LayerRef, local: str) -> bool:
        """Whether a member's tensor is the base's own."""
        if ref.variant not in self.others:
            return True
        adapter = self.others[ref.variant].adapter
        return adapter is not None and self.architecture.tensor_name(ref.layer, local) not in adapter.changed


class Prefixes:
    """Hidden states after the first layers of recipes, by path and batch, at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.states: ByteCache[tuple[str, Hashable], Tensor] = ByteCache(limit)
        self._path: tuple[str, ...] = ()
        self._stride = 1

    def start(self, path: Sequence[str], depth_bytes: int) -> None:
        """Start a path; `depth_bytes` is the size of all batches' hidden states after one layer."""
        self._path = tuple(path)
        self._stride = max(1, -(-len(path) * depth_bytes * _PATHS // max(self.states.limit, 1)))

    def deepest(self, batch: Hashable) -> tuple[int, Tensor | None]:
        """The deepest known state of a batch on the path, with its number of layers; 0 and None if there is none."""
        found: tuple[int, Tensor | None] = (0, None)
        # Mark all of them as used, the first layers last, because other paths share these most likely.
        for depth in range(len(self._path), 0, -1):
            h_BTD = self.states.get((self._path[depth - 1], batch))
            if h_BTD is not None and found[1] is None:
                found = depth, h_BTD
        return found

    def keeps(self, depth: int) -> bool:
        """Whether to keep states after this many layers: every n-th of a long path, so that several paths fit."""
        # Nobody can share the state after the last layer: that would be the same recipe.
        return depth % self._stride == 0 and depth < len(self._path)

    def keep(self, depth: int, batch: Hashable, h_BTD: Tensor) -> None:
        """Keep the state of a batch after `depth` layers of the path."""
        self.states.put((self._path[depth - 1], batch), h_BTD, h_BTD.nbytes)


class Runner:
    """Runs recipes on batches, one recipe at a time; `work` counts layer-forwards times tokens."""

    def __init__(self, model: FamilyModel, *, prefix_bytes: int, entry_bytes: int) -> None:
        self.model = model
        self.stream = LayerStream(model.model, model.architecture)
        self.prefixes = Prefixes(prefix_bytes)
        self.work = 0
        self._entries: ByteCache[Hashable, Entry] = ByteCache(entry_bytes)

    def logits(self, recipe: Recipe, batches: Sequence[tuple[Hashable, Rows]], *, tokens: int) -> Iterator[Tensor]:
        """The requested logits `[N, V]` of each batch; on a CPU several batches run side by side.

        Args:
            batches: each with its key.
            tokens: of all batches of the recipe, with padding.
        """
        model = self.model
        self.prefixes.start(path_of(recipe), tokens * self.stream.state.size * model.model.dtype.itemsize)
        modules: dict[int, nn.Module] = {}
        sources = [op.sources[0].layer for op in recipe.layers]

        def prepare(batch: tuple[Hashable, Rows]) -> tuple[tuple[Hashable, Rows], Entry, int, Tensor]:
            """The batch, and the state that it starts from."""
            entry = self._entry(*batch)
            depth, known = self.prefixes.deepest(batch[0])
            for index in range(depth, len(recipe.layers)):
                if index not in modules:
                    modules[index] = model.module(recipe.layers[index], recipe.fitted.get(index))
            return batch, entry, depth, entry.h_BTD if known is None else known

        def work(given: tuple[tuple[Hashable, Rows], Entry, int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
            _, entry, first, h_BTD = given
            kept: dict[int, Tensor] = {}
            for index in range(first, len(sources)):
                h_BTD = self.stream.run(modules[index], h_BTD, entry.calls[sources[index]])
                if self.prefixes.keeps(index + 1):
                    kept[index + 1] = h_BTD
            return h_BTD, kept

        workers = workers_for(model.device, max(len(batches), 1))
        for ((name, rows), _, first, _), (h_BTD, kept) in side_by_side(map(prepare, batches), work, workers):
            for depth, state_BTD in kept.items():
                self.prefixes.keep(depth, name, state_BTD)
            self.work += (len(sources) - first) * rows.ids_BT.numel()
            h_N1D = h_BTD[rows.row_N.to(model.device), rows.column_N.to(model.device)][:, None]
            # Norm and head work on single positions, so that each requested position can be a row of its own.
            ids_N1 = torch.zeros(h_N1D.shape[:2], dtype=torch.int64, device=model.device)
            yield self.stream.logits(h_N1D, ids_N1, None)[:, 0]

    def clear(self) -> None:
        """Drop all caches."""
        self.prefixes.states.clear()
        self._entries.clear()
        self.model.clear()

    def _entry(self, batch: Hashable, rows: Rows) -> Entry:
        """The input of the first layer for some rows."""
        entry = self._entries.get(batch)
        if entry is None:
            entry = self.stream.enter_with(inputs_of(self.model.model, rows))
            tensors = {id(tensor): tensor for tensor in _tensors([entry.h_BTD, *entry.calls])}
            self._entries.put(batch, entry, sum(tensor.nbytes for tensor in tensors.values()))
        return entry


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in the arguments of layers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif hasattr(value, "kwargs"):
        yield from _tensors([*value.args, *value.kwargs.values()])
