"""A layer computed head by head and channel by channel, straight from the definition, for pieces of several layers.

Every source layer keeps its own norms here; nothing is folded, sliced in bulk or joined. Shape suffixes: `B`
sequences, `T` tokens, `D` residual width, `H` width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.anatomy.spec import Anatomy
from intarsia.building.resident import Resident
from intarsia.calibration.stream import LayerCall
from intarsia.recipe.ops import Concat, Cut

Tensors = Mapping[str, Tensor]


def concat_output(op: Concat, resident: Resident, h_BTD: Tensor, call: LayerCall) -> Tensor:
    """The residual stream behind the layer that a `Concat` with folded norms describes."""
    anatomy, opt = resident.anatomy, resident.anatomy.family.name == "opt"
    layers = [_tensors(resident.layers[cut.source.layer]) for cut in op.cuts]
    names = ("self_attn_layer_norm", "final_layer_norm") if opt else ("input_layernorm", "post_attention_layernorm")
    out, down = ("self_attn.out_proj", "fc2") if opt else ("self_attn.o_proj", "mlp.down_proj")

    added = torch.zeros_like(h_BTD)
    for cut, layer in zip(op.cuts, layers, strict=True):
        x_BTD = _norm(h_BTD, layer, names[0], resident)
        for group in cut.kv_groups:
            added += _group(group, x_BTD, layer, op, layers, resident, call)
        if f"{out}.bias" in layer:
            added += cut.weights["attention"] * layer[f"{out}.bias"]
    h_BTD = h_BTD + added

    added = torch.zeros_like(h_BTD)
    for cut, layer in zip(op.cuts, layers, strict=True):
        x_BTD = _norm(h_BTD, layer, names[1], resident)
        for channel in cut.channels:
            value = _channel(channel, x_BTD, layer, anatomy)
            added += value[..., None] * layer[f"{down}.weight"][:, channel]
        if f"{down}.bias" in layer:
            added += cut.weights["mlp"] * layer[f"{down}.bias"]
    return h_BTD + added


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def _norm(h_BTD: Tensor, layer: Tensors, name: str, resident: Resident) -> Tensor:
    if f"{name}.bias" in layer:
        centred = h_BTD - h_BTD.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * layer[f"{name}.weight"] + layer[f"{name}.bias"]
    return _rms(h_BTD, resident) * layer[f"{name}.weight"]


def _rms(x: Tensor, resident: Resident) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + resident.model.config.rms_norm_eps).sqrt()


def _row_of(layer: Tensors, module: str, row: int, x_BTD: Tensor) -> Tensor:
    value = x_BTD @ layer[f"{module}.weight"][row]
    return value + layer[f"{module}.bias"][row] if f"{module}.bias" in layer else value


def _head(layer: Tensors, module: str, head: int, size: int, x_BTD: Tensor) -> Tensor:
    return torch.stack([_row_of(layer, module, head * size + i, x_BTD) for i in range(size)], dim=-1)


def _group(
    group: int,
    x_BTD: Tensor,
    layer: Tensors,
    op: Concat,
    layers: list[dict[str, Tensor]],
    resident: Resident,
    call: Any,
) -> Tensor:
    """What one key/value head and the query heads that read it add to the residual stream."""
    anatomy, config = resident.anatomy, resident.model.config
    size = anatomy.head_dim
    key = _head(layer, "self_attn.k_proj", group, size, x_BTD)
    value = _head(layer, "self_attn.v_proj", group, size, x_BTD)
    if "self_attn.k_norm.weight" in layer:
        key = _rms(key, resident) * _averaged(op, layers, "self_attn.k_norm.weight")
    rotary = call.kwargs.get("position_embeddings")
    key = key if rotary is None else _rotated(key, *rotary)
    tokens = x_BTD.shape[1]
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (back >= 0) & (back < _window(config, anatomy, op.cuts[0]))
    out = "self_attn.out_proj" if "self_attn.out_proj.weight" in layer else "self_attn.o_proj"
    added = torch.zeros_like(x_BTD)
    for head in range(group * anatomy.heads_per_group, (group + 1) * anatomy.heads_per_group):
        query = _head(layer, "self_attn.q_proj", head, size, x_BTD)
        if "self_attn.q_norm.weight" in layer:
            query = _rms(query, resident) * _averaged(op, layers, "self_attn.q_norm.weight")
        query = query if rotary is None else _rotated(query, *rotary)
        scores = (query @ key.transpose(1, 2) / size**0.5).masked_fill(~seen, -torch.inf)
        read = scores.softmax(-1) @ value
        for i in range(size):
            added += read[..., i, None] * layer[f"{out}.weight"][:, head * size + i]
    return added


def _window(config: Any, anatomy: Anatomy, cut: Cut) -> int:
    """How many tokens back a layer looks, itself included."""
    window = getattr(config, "sliding_window", None) or 10**6
    if anatomy.layer_types is not None and anatomy.layer_types[cut.source.layer] == "full_attention":
        return 10**6
    return int(window)


def _averaged(op: Concat, layers: list[dict[str, Tensor]], name: str) -> Tensor:
    total = torch.zeros_like(layers[0][name])
    for cut, layer in zip(op.cuts, layers, strict=True):
        total += cut.weights["attention"] * layer[name]
    return total


def _rotated(x_BTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    first, second = x_BTH.chunk(2, dim=-1)
    return x_BTH * cos_BTH + torch.cat([-second, first], dim=-1) * sin_BTH


def _channel(channel: int, x_BTD: Tensor, layer: Tensors, anatomy: Anatomy) -> Tensor:
    if anatomy.family.name == "opt":
        return _row_of(layer, "fc1", channel, x_BTD).relu()
    gate = _row_of(layer, "mlp.gate_proj", channel, x_BTD)
    return gate * torch.sigmoid(gate) * _row_of(layer, "mlp.up_proj", channel, x_BTD)
