"""The layers of a family in memory, each tensor once, and what trials share of their work.

The base is loaded as a model. A layer that a recipe takes whole from a full checkpoint is a module on tensors that are
mapped from its file; one of an adapter shares with the base what the adapter leaves alone. Merged layers, and layers of
an adapter, are made when they are first needed and stay in a cache with a bound in bytes.

A layer's tensors are those of the built folder as it would be loaded: made from the files' tensors, rounded to the
files' dtype, and then in the dtype that the model runs in. Hidden states after shared first layers are kept too, in a
cache that evicts the least recently used; scores of examples are computed once.

How far a candidate's next tokens are from the base's is measured with little kept of the base: of each position its
`TOP` likeliest tokens, 8 bytes each, and the rest as one bucket. Keeping the base's hidden state instead would cost
another product with the head a trial, as much time as several layers. The divergence over these outcomes is a lower
bound of the full one, and 0 where the full one is.

Shapes: B sequences, T tokens, D residual width, N positions, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.activations.batches import side_by_side, workers_for
from intarsia.activations.loss import Likeliest
from intarsia.activations.stream import Entry, LayerStream
from intarsia.building.layer import tensor_names
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.building.loading import set_parameter
from intarsia.evaluation.likelihood import Batch, Rows, inputs_of, score_batch
from intarsia.recipe.recipe import LayerRef, Op, Recipe, Select
from intarsia.tailoring.family import Family
from intarsia.tailoring.history import TrialFailed
from intarsia.tailoring.objective import Objective, Segment, segments

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Fitted = Mapping[str, npt.NDArray[np.float32]]

_PATHS = 4  # whose states fit at least


class ByteCache(Generic[K, V]):
    """Values by key, `limit` bytes of them at most; the least recently used go first."""

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


def layer_key(op: Op, fitted: Fitted | None = None) -> str:
    """The same for two layers of the same tensors, run with the same arguments, within one family."""
    digest = hashlib.sha256(f"{type(op).__name__} {json.dumps(asdict(op), sort_keys=True)}".encode())
    for name, array in sorted((fitted or {}).items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def path_of(recipe: Recipe) -> tuple[str, ...]:
    """A key after every layer of a recipe: the same for two recipes that are the same up to there."""
    found: list[str] = []
    for index, op in enumerate(recipe.layers):
        before = found[-1] if found else ""
        found.append(hashlib.sha256(f"{before}/{layer_key(op, recipe.fitted.get(index))}".encode()).hexdigest())
    return tuple(found)


class FamilyModel(LoadedModel):
    """A family's base as a model, and layer modules for any op over the family.

    Attributes:
        base: its name.
        made: how many modules were made so far.
    """

    def __init__(self, family: Family, *, device: torch.device, dtype: torch.dtype | None, memory_bytes: int) -> None:
        """
        Args:
            memory_bytes: for modules that are made.
        """
        self.base, *others = family.names
        checkpoints = family.checkpoints()
        beside = {name: checkpoints[name] for name in others}
        super().__init__(checkpoints[self.base], device=device, dtype=dtype, others=beside)
        self.made = 0
        self._modules: ByteCache[str, nn.Module] = ByteCache(memory_bytes)

    def module(self, op: Op, fitted: Fitted | None = None) -> nn.Module:
        """The layer that an op describes.

        Args:
            fitted: tensors that replace the op's own, by name inside the layer.
        """
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
        """Drop the modules that were made."""
        self._modules.clear()

    def _new(self, op: Op, fitted: Fitted) -> tuple[nn.Module, int]:
        """A new module, and the bytes that it does not share with the base."""
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
    """Hidden states after the first layers of recipes, by path and batch, `limit` bytes of them at most."""

    def __init__(self, limit: int) -> None:
        self.states: ByteCache[tuple[str, Hashable], Tensor] = ByteCache(limit)
        self._path: tuple[str, ...] = ()
        self._stride = 1

    def start(self, path: Sequence[str], depth_bytes: int) -> None:
        """Start on a path.

        Args:
            depth_bytes: hidden states of all its batches after one layer.
        """
        self._path = tuple(path)
        self._stride = max(1, -(-len(path) * depth_bytes * _PATHS // max(self.states.limit, 1)))

    def deepest(self, batch: Hashable) -> tuple[int, Tensor | None]:
        """After how many layers of the path a batch's state is known, and that state; 0 and None if after none."""
        found: tuple[int, Tensor | None] = (0, None)
        # All of them count as used, the first layers last: they are what others will most likely share.
        for depth in range(len(self._path), 0, -1):
            h_BTD = self.states.get((self._path[depth - 1], batch))
            if h_BTD is not None and found[1] is None:
                found = depth, h_BTD
        return found

    def keeps(self, depth: int) -> bool:
        """Whether states after this many layers are kept: of a long path every n-th, so that several paths fit."""
        # The state after the last layer is of no use to others: whoever shares it is the same recipe.
        return depth % self._stride == 0 and depth < len(self._path)

    def keep(self, depth: int, batch: Hashable, h_BTD: Tensor) -> None:
        """Keep the state of a batch after `depth` layers of the path."""
        self.states.put((self._path[depth - 1], batch), h_BTD, h_BTD.nbytes)


class Runner:
    """Runs recipes on batches, one recipe after the other.

    Attributes:
        model: makes their layers.
        prefixes: states after the first layers of earlier recipes.
        work: layer-forwards times tokens so far.
    """

    def __init__(self, model: FamilyModel, *, prefix_bytes: int, entry_bytes: int) -> None:
        self.model = model
        self.stream = LayerStream(model.model, model.architecture)
        self.prefixes = Prefixes(prefix_bytes)
        self.work = 0
        self._entries: ByteCache[Hashable, Entry] = ByteCache(entry_bytes)

    def logits(
        self, recipe: Recipe, path: Sequence[str], batches: Sequence[tuple[Hashable, Rows]], *, tokens: int
    ) -> Iterator[Tensor]:
        """The `[N, V]` logits that each batch's rows want; on a CPU several batches are run side by side.

        Args:
            path: of the recipe.
            batches: each with what identifies it.
            tokens: of all batches of the recipe, with padding.
        """
        model = self.model
        self.prefixes.start(path, tokens * self.stream.state.size * model.model.dtype.itemsize)
        modules: dict[int, nn.Module] = {}
        sources = [op.sources[0].layer for op in recipe.layers]

        def prepare(batch: tuple[Hashable, Rows]) -> tuple[tuple[Hashable, Rows], Entry, int, Tensor]:
            """The batch, and the state that it is run from."""
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
            # Norm and head look at one position at a time, so that each wanted position may be a row of its own.
            ids_N1 = torch.zeros(h_N1D.shape[:2], dtype=torch.int64, device=model.device)
            yield self.stream.logits(h_N1D, ids_N1, None)[:, 0]

    def clear(self) -> None:
        """Drop all caches."""
        self.prefixes.states.clear()
        self._entries.clear()
        self.model.clear()

    def _entry(self, batch: Hashable, rows: Rows) -> Entry:
        """What the model makes of rows before its first layer."""
        entry = self._entries.get(batch)
        if entry is None:
            entry = self.stream.enter_with(inputs_of(self.model.model, rows))
            tensors = {id(tensor): tensor for tensor in _tensors([entry.h_BTD, *entry.calls])}
            self._entries.put(batch, entry, sum(tensor.nbytes for tensor in tensors.values()))
        return entry


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in arguments of layers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif hasattr(value, "kwargs"):
        yield from _tensors([*value.args, *value.kwargs.values()])


_RESULT_BYTES = 32 * 1024 * 1024
_RESULT_OVERHEAD = 400  # bytes of a small array with its key

Values = npt.NDArray[np.float64]
Unit = tuple[int, Segment]
"""Examples that are run together: the number of their objective, and which of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Of one recipe at one budget."""

    # Each example's score, by objective.
    examples: tuple[Values, ...]
    # Of an objective of questions whether each is answered rightly, else None.
    right: tuple[Values | None, ...]
    # Layer-forwards times tokens that were run for it; tokens of the budget.
    work: int
    tokens: int


class Scorer:
    """Scores recipes on the first examples of objectives."""

    def __init__(
        self,
        runner: Runner,
        objectives: Sequence[Objective],
        *,
        cuts: Sequence[int],
        pack: bool,
        batch_tokens: int,
        uncut: Recipe,
    ) -> None:
        """Ready to score.

        Args:
            cuts: the budgets that are expected; examples between two of them are run together.
            pack: whether the model takes rows of several continuations.
            batch_tokens: rows times columns of a batch, at most.
            uncut: the base as it is, from which divergences are taken.
        """
        self._runner, self._objectives, self._uncut = runner, tuple(objectives), uncut
        self._cuts, self._pack, self._batch_tokens = tuple(cuts), pack, batch_tokens
        self._batches: dict[Unit, tuple[Batch, ...]] = {}
        self._base: dict[tuple[Unit, int], Likeliest] = {}
        self._results: ByteCache[tuple[str, Unit], Values] = ByteCache(_RESULT_BYTES)

    def clear(self) -> None:
        """Drop all caches."""
        self._batches.clear()
        self._base.clear()
        self._results.clear()

    def score(self, recipe: Recipe, budget: int) -> Scored:
        """The scores of every objective's examples within a budget."""
        counts = [objective.count(budget) for objective in self._objectives]
        units = [(number, segment) for number, count in enumerate(counts) for segment in segments(count, self._cuts)]
        tokens = sum(batch.rows.ids_BT.numel() for unit in units for batch in self._of(unit))
        unknown = [unit for unit in units if self._measures_kl(unit) and (unit, 0) not in self._base]
        for name, _, logits_NV in self._logits(self._uncut, unknown, tokens):
            self._base[name] = Likeliest.of(logits_NV)
        work, key = self._runner.work, path_of(recipe)[-1]
        known = {unit: self._results.get((key, unit)) for unit in units}
        found = {unit: values_R for unit, values_R in known.items() if values_R is not None}
        found |= self._values(recipe, [unit for unit in units if unit not in found], tokens)
        for unit, values_R in found.items():
            self._results.put((key, unit), values_R, values_R.nbytes + _RESULT_OVERHEAD)
        both = [
            (objective, np.concatenate([found[unit] for unit in units if unit[0] == number]))
            for number, objective in enumerate(self._objectives)
        ]
        return Scored(
            examples=tuple(objective.scores(values_R) for objective, values_R in both),
            right=tuple(objective.right(values_R) for objective, values_R in both),
            work=self._runner.work - work,
            tokens=tokens,
        )

    def _of(self, unit: Unit) -> tuple[Batch, ...]:
        """The batches of some examples."""
        if unit not in self._batches:
            objective = self._objectives[unit[0]]
            self._batches[unit] = objective.batches(unit[1], pack=self._pack, batch_tokens=self._batch_tokens)
        return self._batches[unit]

    def _measures_kl(self, unit: Unit) -> bool:
        return self._objectives[unit[0]].measure == "kl"

    def _logits(
        self, recipe: Recipe, units: Sequence[Unit], tokens: int
    ) -> Iterator[tuple[tuple[Unit, int], Batch, Tensor]]:
        """The logits of every batch, with its name."""
        batches = [((unit, place), batch) for unit in units for place, batch in enumerate(self._of(unit))]
        rows = [(name, batch.rows) for name, batch in batches]
        found = self._runner.logits(recipe, path_of(recipe), rows, tokens=tokens)
        for (name, batch), logits_NV in zip(batches, found, strict=True):
            yield name, batch, logits_NV

    def _values(self, recipe: Recipe, units: Sequence[Unit], tokens: int) -> dict[Unit, Values]:
        """Of every request its log-likelihood, or its divergence from the base."""
        sums = {}
        for number, segment in units:
            requests = sum(len(example.requests) for example in self._objectives[number].examples[slice(*segment)])
            sums[number, segment] = torch.zeros(requests, dtype=torch.float64)
        for name, batch, logits_NV in self._logits(recipe, units, tokens):
            if self._measures_kl(name[0]):
                value_N = self._base[name].divergence(logits_NV)
                value_M = value_N[batch.position_M.to(value_N.device)]
            else:
                value_M = score_batch(logits_NV, batch)
            value_M = value_M.cpu().double()
            if not bool(value_M.isfinite().all()):
                raise TrialFailed(f"NaN or infinity in {self._objectives[name[0][0]].name}")
            sums[name[0]].index_add_(0, batch.request_M, value_M)
        return {unit: sums_R.numpy() for unit, sums_R in sums.items()}
