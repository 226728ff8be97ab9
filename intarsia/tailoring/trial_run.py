"""The layers of a family in memory, each tensor once, and what trials share of their work.

The base is loaded as a model. A layer that a recipe takes whole from a full checkpoint is a module on tensors that are
mapped from its file; one of an adapter shares with the base what the adapter leaves alone. Merged layers, and layers of
an adapter, are made when they are first needed and stay in a cache with a bound in bytes.

A layer's tensors are those of the built folder as it would be loaded: made from the files' tensors, rounded to the
files' dtype, and then in the dtype that the model runs in. Hidden states after shared first layers are kept too, in a
cache that evicts the least recently used.
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

from intarsia.activations.stream import Entry, LayerStream
from intarsia.building.layer import layer_tensors, tensor_names, to_parameters
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.evaluation.likelihood import Rows
from intarsia.evaluation.run_rows import inputs_of
from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.family import Family
from intarsia.tailoring.history import TrialFailed

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Values by key, `limit` bytes of them at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which now counts as used; None if it is not there."""
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Hold a value in place of the oldest ones. One that is larger than the whole cache is not held."""
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

    def __len__(self) -> int:
        return len(self._held)


def bytes_of(tensor: Tensor) -> int:
    """What a tensor occupies; a view counts as what it shows."""
    return tensor.numel() * tensor.element_size()


_PATHS = 4  # that fit at least


def layer_key(op: Op, fitted: Mapping[str, npt.NDArray[np.float32]] | None = None) -> str:
    """The same for two layers of the same tensors, run with the same arguments, within one family."""
    digest = hashlib.sha256(f"{type(op).__name__} {json.dumps(asdict(op), sort_keys=True)}".encode())
    for name, array in sorted((fitted or {}).items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def path_of(recipe: Recipe) -> tuple[str, ...]:
    """A key after every layer of a recipe."""
    found: list[str] = []
    for index, op in enumerate(recipe.layers):
        before = found[-1] if found else ""
        own = layer_key(op, recipe.fitted.get(index))
        found.append(hashlib.sha256(f"{before}/{own}".encode()).hexdigest())
    return tuple(found)


class Prefixes:
    """Hidden states by key and batch, `limit` bytes of them at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._nodes: OrderedDict[str, dict[Hashable, Tensor]] = OrderedDict()
        self._path: tuple[str, ...] = ()
        self._stride = 1

    def begin(self, path: Sequence[str], depth_bytes: int) -> None:
        """Start on a path.

        Args:
            depth_bytes: hidden states of all its batches after one layer.
        """
        self._path = tuple(path)
        self._stride = max(1, -(-len(path) * depth_bytes * _PATHS // max(self.limit, 1)))
        for key in reversed(self._path):  # the first layers last: they are what others will most likely share
            if key in self._nodes:
                self._nodes.move_to_end(key)

    def deepest(self, batch: Hashable) -> tuple[int, Tensor | None]:
        """After how many layers of the path a batch's state is known, and that state; 0 and None if after none."""
        for depth in range(len(self._path), 0, -1):
            h_BTD = self._nodes.get(self._path[depth - 1], {}).get(batch)
            if h_BTD is not None:
                return depth, h_BTD
        return 0, None

    def keep(self, depth: int, batch: Hashable, h_BTD: Tensor) -> None:
        """Keep the state of a batch after `depth` layers of the path, if that depth is kept and memory suffices."""
        # The state after the last layer is of no use to others: whoever shares it is the same recipe.
        if depth % self._stride or depth == len(self._path):
            return
        size = bytes_of(h_BTD)
        if not self._evict_for(size):
            return
        node = self._nodes.setdefault(self._path[depth - 1], {})
        assert batch not in node, "a state that is known is not computed again"
        node[batch] = h_BTD
        self.nbytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._nodes.clear()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def _evict_for(self, size: int) -> bool:
        if self.nbytes + size <= self.limit:
            return True
        own = set(self._path)
        for key in [key for key in self._nodes if key not in own]:
            self.nbytes -= sum(bytes_of(h_BTD) for h_BTD in self._nodes.pop(key).values())
            if self.nbytes + size <= self.limit:
                return True
        return False


Fitted = Mapping[str, npt.NDArray[np.float32]]


class ResidentFamily:
    """A family's base as a model, and layer modules for any op over the family.

    Attributes:
        resident: the base, which can also make the family's other layers (for the closed form).
        made: how many modules were made so far.
    """

    def __init__(self, family: Family, *, device: torch.device, dtype: torch.dtype | None, memory_bytes: int) -> None:
        checkpoints = family.checkpoints()
        self.base = family.names[0]
        others = {name: checkpoint for name, checkpoint in checkpoints.items() if name != self.base}
        self.resident = LoadedModel(checkpoints[self.base], device=device, dtype=dtype, others=others)
        self.made = 0
        self._modules: ByteCache[str, nn.Module] = ByteCache(memory_bytes)

    def module(self, op: Op, fitted: Fitted | None = None) -> nn.Module:
        """The layer that an op describes.

        Args:
            fitted: tensors that replace the op's own, by name inside the layer.

        Raises:
            TrialFailed: a tensor of it is NaN or infinite.
        """
        if isinstance(op, Select) and op.source.variant == self.base and not fitted:
            return self.resident.layers[op.source.layer]
        key = layer_key(op, fitted)
        module = self._modules.get(key)
        if module is None:
            module, nbytes = self._make(op, fitted or {})
            self._modules.put(key, module, nbytes)
            self.made += 1
        return module

    def clear(self) -> None:
        """Drop the modules that were made."""
        self._modules.clear()

    def _make(self, op: Op, fitted: Fitted) -> tuple[nn.Module, int]:
        """A new module, and the bytes that it does not share with the base."""
        tensors = layer_tensors(op, self.resident.architecture, self._read)
        tensors |= {name: torch.from_numpy(array).to(tensors[name].dtype) for name, array in fitted.items()}
        architecture = self.resident.architecture
        parameters = to_parameters(tensors, architecture)
        original = self.resident.layers[op.sources[0].layer]
        module, own = twin(original), 0
        for name, parameter in list(original.named_parameters()):
            tensor, stored = parameters[name], tensor_names(name, architecture)
            untouched = not any(part in fitted for part in stored)
            if isinstance(op, Select) and untouched and all(self._is_base(op.source, part) for part in stored):
                continue
            if not bool(tensor.isfinite().all()):
                sources = ", ".join(map(str, op.sources))
                raise TrialFailed(f"{name} of the layer made from {sources} is NaN or infinite")
            tensor = tensor.to(device=self.resident.device, dtype=parameter.dtype)
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
            own += bytes_of(tensor)
        return module.eval(), own

    def _is_base(self, ref: LayerRef, local: str) -> bool:
        """Whether a member's tensor is the base's own."""
        adapter = self.resident.others[ref.variant].adapter if ref.variant in self.resident.others else None
        name = self.resident.architecture.tensor_name(ref.layer, local)
        return ref.variant == self.base or (adapter is not None and name not in adapter.changed)

    def _read(self, ref: LayerRef, local: str) -> Tensor:
        return self.resident.others.get(ref.variant, self.resident.checkpoint).layer_tensor(ref.layer, local)


class Runner:
    """Runs recipes on batches, one recipe after the other.

    Attributes:
        layers: makes their layers.
        prefixes: states after the first layers of earlier recipes.
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
        """Drop the recipe's layers that are in no cache."""
        self._recipe, self._modules = None, {}

    def clear(self) -> None:
        """Drop all caches."""
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
        """The residual stream after the last layer."""
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
