"""Running a model layer by layer, from any depth.

No modeling code is copied. The model's own forward is called with stand-ins in place of its layers: the first stand-in
returns a given hidden state, and every stand-in records the arguments that the model passed to its layer (masks, rotary
embeddings, ...). So embedding, per-layer arguments, final norm and head are the model's own, whatever its family, and
any layer can run between them.

Layers pass on one tensor, the state: the residual stream first; then other streams, in models that have several (Gemma
3n, DeepSeek 4); then the keys and values that later layers read, if layers share them (Gemma 3n and 4), zeros until
they are computed.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width, `S` width of the state, `H` heads of keys and values,
`V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from intarsia.activations.loss import Likeliest, next_token_losses
from intarsia.architecture.spec import Architecture

Shared = dict[str, tuple[Tensor, Tensor]]
"""Keys and values, `[B, H, T, ...]` each, by the kind of layer that reads them."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The layout of a state."""

    # Width of the residual stream.
    width: int
    # Number of residual streams, and their dimension in the model's own hidden states; None: the last one.
    streams: int = 1
    axis: int | None = None
    # Columns of the keys (and equally of the values), and of one head, by the kind of layer.
    shared: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, shape: Sequence[int], width: int, layers: Iterable[nn.Module]) -> State:
        """The layout of a model's state.

        Args:
            shape: of its own hidden states for one sequence of two tokens.
            layers: its layers, some of which may read the keys and values of others.
        """
        shared = {}
        for layer in layers:
            attention: Any = getattr(layer, "self_attn", None)
            if getattr(attention, "store_full_length_kv", False):
                shared[str(attention.layer_type)] = (int(attention.k_proj.out_features), int(attention.head_dim))
        axis = None if len(shape) == 3 else 2 if tuple(shape[:2]) == (1, 2) else 0
        return cls(width=width, streams=math.prod(shape) // (2 * width), axis=axis, shared=shared)

    @property
    def size(self) -> int:
        return self.width * self.streams + 2 * sum(columns for columns, _ in self.shared.values())

    def packed(self, hidden: Tensor, shared: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The state `[B, T, S]` from the model's own hidden states and the keys and values shared so far."""
        h_BTD = hidden if self.axis is None else hidden.movedim(self.axis, 2).flatten(2)
        parts = [h_BTD]
        for kind, (columns, _) in self.shared.items():
            if kind in shared:
                parts += [each.transpose(1, 2).flatten(2).to(h_BTD.dtype) for each in shared[kind]]
            else:
                parts.append(h_BTD.new_zeros(*h_BTD.shape[:2], 2 * columns))
        return torch.cat(parts, dim=-1) if self.shared else h_BTD

    def unpacked(self, state_BTS: Tensor) -> tuple[Tensor, Shared]:
        """The model's own hidden states, and the shared keys and values, from a state."""
        start, found = self.width * self.streams, Shared()
        hidden = state_BTS[..., :start]
        for kind, (columns, head) in self.shared.items():
            both = state_BTS[..., start : start + 2 * columns].unflatten(-1, (2, -1, head)).permute(2, 0, 3, 1, 4)
            found[kind], start = (both[0], both[1]), start + 2 * columns
        if self.axis is not None:
            hidden = hidden.unflatten(2, (self.streams, self.width)).movedim(2, self.axis)
        return hidden, found


LOGIT_BYTES = 128 * 1024**2


class _Probed(NamedTuple):
    """Facts about a model's layers from running one; gathered once, because a streamed model reads a layer for it."""

    # Number of values that a layer returns; 0 for a tensor.
    returns: int
    # Shape of its input hidden states for one sequence of two tokens.
    shape: tuple[int, ...]
    # Whether what the model passes to its layers depends on the tokens, not only on their number.
    by_tokens: bool = False


_PROBED: WeakKeyDictionary[PreTrainedModel, _Probed] = WeakKeyDictionary()


class _Seen(Exception):
    """Raised after the first layer, to skip the rest of the model."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """The arguments, besides the hidden state, that the model passes to one layer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerCall:
        """The arguments on a device, and floating-point tensors in another dtype if one is given."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        args, kwargs = tree_map_only(Tensor, moved, (self.args, dict(self.kwargs)))
        return LayerCall(args=args, kwargs=kwargs)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The input of the layers for a batch: H^0 and every original layer's arguments."""

    h_BTD: Tensor
    calls: tuple[LayerCall, ...]


class _StandIn(nn.Module):
    """Takes a layer's place in a model's forward. Attributes of the layer itself remain readable."""

    def __init__(self, layer: nn.Module, *, returns: int, inject: Tensor | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self.returns = returns
        self.inject = inject
        self.seen: LayerCall | None = None
        self.received: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen = LayerCall(args=args, kwargs=kwargs)
        self.received = hidden_states
        out = hidden_states if self.inject is None else self.inject
        return (out, *[None] * (self.returns - 1)) if self.returns else out


class LayerStream:
    """A model opened between its layers.

    Attributes:
        model: the transformers model; its layers can run in any order, and others in their place.
        n_calls: layers of the original model, each with its own arguments.
        by_tokens: whether these depend on the tokens, not only on their number.
        state: the layout of hidden states `h_BTD`.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self.model = model
        path, _, name = architecture.layers_in_memory.rpartition(".")
        self._owner = model.get_submodule(path)
        self._name = name
        self._layers: nn.ModuleList = getattr(self._owner, name)
        self.n_calls = len(self._layers)
        self._vocabulary = architecture.vocabulary
        embedding: nn.Module = model.get_submodule(architecture.embedding_in_memory)
        self.device = next(embedding.parameters()).device
        known = _PROBED.get(model)
        self._returns, shape, self.by_tokens = known or _Probed(*probe(model, self._layers[0], self.device))
        self.state = State.of(shape, architecture.width, self._layers if architecture.removal_only else ())
        self._unpadded: dict[tuple[int, int], tuple[LayerCall, ...]] = {}
        if known is None:
            self.by_tokens = architecture.removal_only and self._probe_tokens()
            _PROBED[model] = _Probed(self._returns, shape, self.by_tokens)

    def enter(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Entry:
        """Embed a batch.

        Args:
            mask_BT: True where a token is real; None without padding.
        """
        return self.enter_with(self._inputs(ids_BT, mask_BT))

    def enter_with(self, inputs: Mapping[str, Any]) -> Entry:
        """Embed a batch, given as the model's own keyword arguments, on its device."""
        with self._stand_ins() as stand_ins:
            self.model.base_model(**inputs)
        h_BTD = stand_ins[0].received
        assert h_BTD is not None
        calls = tuple(stand_in.seen for stand_in in stand_ins if stand_in.seen is not None)
        assert len(calls) == self.n_calls, "the model ran layers other than those of its architecture"
        return Entry(h_BTD=self.state.packed(h_BTD, {}), calls=calls)

    def calls(self, ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[LayerCall, ...]:
        """Every original layer's arguments for a batch, without keeping its embedding.

        Arguments of unpadded batches depend only on the shape, and are cached for the next batch of that shape.
        """
        # Made outside inference mode, so that autograd accepts them too.
        with torch.inference_mode(False), torch.no_grad():
            if mask_BT is not None or self.by_tokens:
                return self.enter(ids_BT, mask_BT).calls
            shape = (ids_BT.shape[0], ids_BT.shape[1])
            if shape not in self._unpadded:
                self._unpadded[shape] = self.enter(ids_BT, None).calls
            return self._unpadded[shape]

    def run(self, layer: nn.Module, h_BTD: Tensor, call: LayerCall) -> Tensor:
        """The state after one layer, on the layer's device."""
        device = next((parameter.device for parameter in layer.parameters()), self.device)
        if device != h_BTD.device and device.type != "meta":
            h_BTD, call = h_BTD.to(device), call.on(device)
        hidden, shared = self.state.unpacked(h_BTD)
        more = {"shared_kv_states": shared} if shared else {}  # the layer adds its own, if others read them
        out = layer(hidden, *call.args, **{**call.kwargs, **more})
        return self.state.packed(out[0] if isinstance(out, tuple | list) else out, shared)

    def residual(self, h_BTD: Tensor) -> Tensor:
        """The residual stream alone."""
        return h_BTD[..., : self.state.width]

    def logits(self, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """`[B, T, V]` logits from H^L, through the model's own final norm and head."""
        with self._stand_ins(inject=h_BTD.to(self.device)):
            logits: Tensor = self.model(**self._inputs(ids_BT, mask_BT)).logits
        return logits

    def losses(
        self,
        h_BTD: Tensor,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        *,
        expected: Likeliest | None = None,
        where: str = "next-token loss",
    ) -> tuple[Tensor, Tensor]:
        """Summed next-token loss of each sequence from H^L, and the tokens predicted in it, on the CPU.

        At most `LOGIT_BYTES` of logits, or those of one sequence, are in memory at a time.

        Args:
            expected: measure the KL to this distribution instead.
        """
        sums, counts = [], []
        for part, keep, logits in self._logits_of(h_BTD, ids_BT, mask_BT):
            own = None if expected is None else expected.rows(part)
            ids = ids_BT[part].to(logits.device)
            total, number = next_token_losses(logits, ids, keep, expected=own, where=where)
            sums.append(total.cpu())
            counts.append(number.cpu())
        return torch.cat(sums), torch.cat(counts)

    def likeliest(self, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> Likeliest:
        """The likeliest next tokens at every position from H^L, on the CPU; undefined at padding."""
        found = [Likeliest.of(logits.flatten(0, 1)) for _, _, logits in self._logits_of(h_BTD, ids_BT, mask_BT)]
        return Likeliest(*(torch.cat(each).cpu().unflatten(0, ids_BT.shape) for each in zip(*found, strict=True)))

    def _logits_of(
        self, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor | None
    ) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
        """Logits of some sequences at a time, with their slice and mask."""
        rows, width = ids_BT.shape
        step = max(1, LOGIT_BYTES // (width * self._vocabulary * h_BTD.element_size()))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            keep = None if mask_BT is None else mask_BT[part]
            yield part, keep, self.logits(h_BTD[part], ids_BT[part], keep)

    def final_norm(self, h_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """H^L after the final norm, `[B, T, D]` (the last hidden state of transformers)."""
        with self._stand_ins(inject=h_BTD.to(self.device)):
            hidden: Tensor = self.model.base_model(**self._inputs(ids_BT, mask_BT)).last_hidden_state
        return hidden

    def _inputs(self, ids_BT: Tensor, mask_BT: Tensor | None) -> dict[str, Any]:
        mask = None if mask_BT is None else mask_BT.long().to(self.device)
        return {"input_ids": ids_BT.to(self.device), "attention_mask": mask, "use_cache": False}

    @contextmanager
    def _stand_ins(self, inject: Tensor | None = None) -> Iterator[list[_StandIn]]:
        hidden = None if inject is None else self.state.unpacked(inject)[0]
        stand_ins = [
            _StandIn(layer, returns=self._returns, inject=hidden if index == 0 else None)
            for index, layer in enumerate(self._layers)
        ]
        setattr(self._owner, self._name, nn.ModuleList(stand_ins))
        try:
            yield stand_ins
        finally:
            setattr(self._owner, self._name, self._layers)

    def _probe_tokens(self) -> bool:
        """Whether the arguments of layers depend on the tokens."""
        with torch.no_grad():
            calls = (self.enter(torch.full((1, 2), token), None).calls for token in (0, 1))
        one, other = (
            [each for each in tree_leaves([(c.args, dict(c.kwargs)) for c in of]) if isinstance(each, Tensor)]
            for of in calls
        )
        return len(one) != len(other) or not all(map(torch.equal, one, other))


def probe(model: PreTrainedModel, layer: nn.Module, device: torch.device) -> tuple[int, tuple[int, ...]]:
    """Facts about the layers from running the first one on two tokens; see `_Probed`."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def look(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((len(output) if isinstance(output, tuple | list) else 0, tuple(hidden.shape)))
        raise _Seen

    handle = layer.register_forward_hook(look, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_Seen):
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    finally:
        handle.remove()
    return seen[0]
