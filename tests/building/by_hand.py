"""A layer computed head by head and channel by channel, straight from the definition, for pieces of several layers.

Every source layer keeps its own norms here; nothing is folded, sliced in bulk or joined. Shape suffixes: `B`
sequences, `T` tokens, `D` residual width, `H` width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.activations.stream import LayerCall
from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building.loaded_model import LoadedModel
from intarsia.recipe.recipe import Concat, Cut

Tensors = Mapping[str, Tensor]


def concat_output(op: Concat, resident: LoadedModel, h_BTD: Tensor, call: LayerCall) -> Tensor:
    """The residual stream after the layer that a `Concat` with folded norms describes."""
    architecture = resident.architecture
    layers = [_tensors(resident.layers[cut.source.layer]) for cut in op.cuts]
    for part in PARTS:
        writer = architecture.writer(part).module
        added = torch.zeros_like(h_BTD)
        for cut, layer in zip(op.cuts, layers, strict=True):
            x_BTD = _input(h_BTD, layer, part, resident)
            if part == "attention":
                for group in cut.kv_groups:
                    added += _group(group, x_BTD, layer, op, layers, resident, call)
            else:
                for channel in cut.channels:
                    value = _channel(channel, x_BTD, layer, resident)
                    added += value[..., None] * layer[f"{writer}.weight"][:, channel]
            if f"{writer}.bias" in layer:
                added += cut.weights[part] * layer[f"{writer}.bias"]
        after = architecture.norm_after(part)
        if after is not None:
            scale = _averaged(op, layers, f"{after.module}.weight", part) + after.offset
            added = _rms(added, resident) * scale
        h_BTD = h_BTD + getattr(resident.model.config, "residual_multiplier", 1.0) * added
    return h_BTD


def _input(h_BTD: Tensor, layer: Tensors, part: Part, resident: LoadedModel) -> Tensor:
    """What a source layer's pieces read."""
    norm = resident.architecture.norm_before(part)
    if norm is None:
        return h_BTD
    name = norm.module
    if f"{name}.bias" not in layer:
        return _rms(h_BTD, resident) * (layer[f"{name}.weight"] + norm.offset)
    centred = h_BTD - h_BTD.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * layer[f"{name}.weight"] + layer[f"{name}.bias"]


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def _rms(x: Tensor, resident: LoadedModel) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + resident.model.config.rms_norm_eps).sqrt()


def _row_of(layer: Tensors, module: str, row: int, x_BTD: Tensor) -> Tensor:
    value = x_BTD @ layer[f"{module}.weight"][row]
    return value + layer[f"{module}.bias"][row] if f"{module}.bias" in layer else value


def _head(layer: Tensors, module: str, head: int, size: int, x_BTD: Tensor) -> Tensor:
    return torch.stack([_row_of(layer, module, head * size + i, x_BTD) for i in range(size)], dim=-1)


def _projected(
    kind: str,
    head: int,
    x_BTD: Tensor,
    layer: Tensors,
    op: Concat,
    layers: list[dict[str, Tensor]],
    resident: LoadedModel,
) -> Tensor:
    """A query, key or value head, after its norm where it has one."""
    architecture, module = resident.architecture, f"self_attn.{kind}_proj"
    size, norm = architecture.head_dim, f"self_attn.{kind}_norm.weight"
    first = head
    if "self_attn.qkv_proj.weight" in layer:
        module = "self_attn.qkv_proj"
        first += {"q": 0, "k": architecture.n_query_heads, "v": architecture.n_query_heads + architecture.n_kv_heads}[
            kind
        ]
    found = _head(layer, module, first, size, x_BTD)
    if norm not in layer:
        return found
    if len(layer[norm]) == size:
        offset = 1.0 if architecture.family.name == "gemma3" else 0.0
        return _rms(found, resident) * (_averaged(op, layers, norm, "attention") + offset)
    # Over all heads of the merged layer, each from its own source and with its own input.
    squares = torch.zeros(x_BTD.shape[:2])
    per_group = 1 if kind == "k" else architecture.heads_per_group
    for cut, each in zip(op.cuts, layers, strict=True):
        assert architecture.norm_before("attention") is None, "every source reads the same"
        for group in cut.kv_groups:
            for other in range(group * per_group, (group + 1) * per_group):
                squares += _head(each, module, other, size, x_BTD).square().sum(-1)
    mean = squares / (architecture.n_kv_heads * per_group * size)
    root = (mean + resident.model.config.rms_norm_eps).sqrt()
    return found / root[..., None] * layer[norm][head * size : (head + 1) * size]


def _group(
    group: int,
    x_BTD: Tensor,
    layer: Tensors,
    op: Concat,
    layers: list[dict[str, Tensor]],
    resident: LoadedModel,
    call: Any,
) -> Tensor:
    """What one key/value head and the query heads that read it add to the residual stream."""
    architecture, config = resident.architecture, resident.model.config
    size = architecture.head_dim
    out = f"{architecture.writer('attention').module}.weight"
    rotary = call.kwargs.get("position_embeddings")
    if not getattr(config, "no_rope_layers", [1] * architecture.n_layers)[op.cuts[0].source.layer]:
        rotary = None
    key = _projected("k", group, x_BTD, layer, op, layers, resident)
    value = _projected("v", group, x_BTD, layer, op, layers, resident)
    key = key if rotary is None else _rotated(key, *rotary)
    tokens = x_BTD.shape[1]
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (back >= 0) & (back < _window(config, architecture, op.cuts[0]))
    scale = getattr(config, "query_pre_attn_scalar", size) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    added = torch.zeros_like(x_BTD)
    for head in range(group * architecture.heads_per_group, (group + 1) * architecture.heads_per_group):
        query = _projected("q", head, x_BTD, layer, op, layers, resident)
        query = query if rotary is None else _rotated(query, *rotary)
        scores = query @ key.transpose(1, 2) * getattr(config, "attention_multiplier", scale)
        scores = scores if cap is None else cap * (scores / cap).tanh()
        read = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        for i in range(size):
            added += read[..., i, None] * layer[out][:, head * size + i]
    return added


def _window(config: Any, architecture: Architecture, cut: Cut) -> int:
    """How many tokens back a layer looks, itself included."""
    window = getattr(config, "sliding_window", None) or 10**6
    if architecture.layer_types is not None and architecture.layer_types[cut.source.layer] == "full_attention":
        return 10**6
    return int(window)


def _averaged(op: Concat, layers: list[dict[str, Tensor]], name: str, part: Part) -> Tensor:
    total = torch.zeros_like(layers[0][name])
    for cut, layer in zip(op.cuts, layers, strict=True):
        total += cut.weights[part] * layer[name]
    return total


def _rotated(x_BTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Rotated as far as there are angles; the rest of the head stays."""
    x_BTH, rest_BTH = x_BTH.split([cos_BTH.shape[-1], x_BTH.shape[-1] - cos_BTH.shape[-1]], dim=-1)
    first, second = x_BTH.chunk(2, dim=-1)
    return torch.cat([x_BTH * cos_BTH + torch.cat([-second, first], dim=-1) * sin_BTH, rest_BTH], dim=-1)


def _channel(channel: int, x_BTD: Tensor, layer: Tensors, resident: LoadedModel) -> Tensor:
    architecture = resident.architecture
    if architecture.family.name == "opt":
        return _row_of(layer, "fc1", channel, x_BTD).relu()
    if "mlp.gate_up_proj.weight" in layer:
        gate = _row_of(layer, "mlp.gate_up_proj", channel, x_BTD)
        up = _row_of(layer, "mlp.gate_up_proj", architecture.n_channels + channel, x_BTD)
    else:
        gate, up = (_row_of(layer, f"mlp.{kind}_proj", channel, x_BTD) for kind in ("gate", "up"))
    if hasattr(resident.model.config, "hidden_activation"):  # Gemma
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    return gate * torch.sigmoid(gate) * up
