"""A joined layer as the sum of what its sources' own layers add, each with the pieces that it does not give silenced.

For families whose layers are not written out in `tests.building.by_hand`: here every source runs as transformers has
it, with its own norms and its own fused matrices; only columns of the writing layers are set to zero. Of a mixture the
routing over the experts of all sources is written out. Shape suffixes: `B` sequences, `T` tokens, `D` residual width,
`E` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.activations.stream import LayerCall
from intarsia.architecture.spec import PARTS, Part
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.recipe.recipe import Concat, Cut

FAMILIES = (
    "gpt_neox",
    "falcon",
    "falcon-one-norm",
    "falcon-two-norms",
    "cohere",
    "cohere2",
    "phi",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)


def concat_output(op: Concat, resident: LoadedModel, h_BTD: Tensor, call: LayerCall) -> Tensor:
    """The residual stream after the layer that a `Concat` with folded norms describes."""
    architecture = resident.architecture
    stages: Sequence[tuple[Part, ...]] = (PARTS,) if architecture.parallel else (("attention",), ("mlp",))
    for parts in stages:
        if architecture.is_mixture(parts[0]):
            return h_BTD + _routed(op, resident, h_BTD)
        added = torch.zeros_like(h_BTD)
        for cut in op.cuts:
            out = _silenced(op, cut, parts, resident)(h_BTD, *call.args, **call.kwargs)
            added += (out[0] if isinstance(out, tuple) else out) - h_BTD
        h_BTD = h_BTD + added
    return h_BTD


def _silenced(op: Concat, cut: Cut, parts: Sequence[Part], resident: LoadedModel) -> nn.Module:
    """The source's own layer, of which only the cut's pieces of some parts write to the residual stream."""
    architecture = resident.architecture
    layer = twin(resident.layers[cut.source.layer])
    for part in PARTS:
        if architecture.is_mixture(part):
            _put(layer, "mlp.experts.down_proj", torch.zeros_like)
            if hasattr(layer.mlp, "shared_expert"):
                _put(layer, "mlp.shared_expert.down_proj.weight", torch.zeros_like)
            continue
        writer = architecture.writer(part)
        kept = torch.zeros(architecture.n_pieces(part))
        if part in parts:
            kept[list(cut.pieces(part))] = 1.0
        columns = kept.repeat_interleave(architecture.unit(writer.segments[0]))
        _put(layer, f"{writer.module}.weight", lambda weight, mask=columns: weight * mask)
        if writer.bias:
            share = cut.weights[part] if part in parts else 0.0
            _put(layer, f"{writer.module}.bias", lambda bias, share=share: bias * share)
    for norm in architecture.norms:
        if norm.place == "inside" and norm.rows is None:
            for kind in ("weight", "bias"):
                if getattr(norm, kind):
                    average = _mean(op, "attention", f"{norm.module}.{kind}", resident)
                    _put(layer, f"{norm.module}.{kind}", lambda _, average=average: average)
    return layer


def _put(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    owner, _, attribute = name.rpartition(".")
    value = change(layer.get_parameter(name).detach())
    setattr(layer.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def _tensor(resident: LoadedModel, cut: Cut, name: str) -> Tensor:
    return resident.layers[cut.source.layer].get_parameter(name).detach()


def _mean(op: Concat, part: Part, name: str, resident: LoadedModel) -> Tensor:
    total: Any = sum(cut.weights[part] * _tensor(resident, cut, name) for cut in op.cuts)
    return total


def _routed(op: Concat, resident: LoadedModel, h_BTD: Tensor) -> Tensor:
    """What the experts of all sources add, each after its own norm, chosen by one router."""
    config: Any = resident.model.config
    unit_BTD = h_BTD / (h_BTD.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    logits, outputs = [], []
    for cut in op.cuts:
        x_BTD = unit_BTD * _tensor(resident, cut, "post_attention_layernorm.weight")
        experts = _tensor(resident, cut, "mlp.experts.gate_up_proj"), _tensor(resident, cut, "mlp.experts.down_proj")
        for expert in cut.channels:
            logits.append(x_BTD @ _tensor(resident, cut, "mlp.gate.weight")[expert])
            gate, up = experts[0][expert].chunk(2)
            outputs.append((torch.nn.functional.silu(x_BTD @ gate.T) * (x_BTD @ up.T)) @ experts[1][expert].T)
    p_BTE = torch.stack(logits, dim=-1).softmax(-1)
    best = p_BTE.topk(config.num_experts_per_tok, dim=-1)
    chosen_BTE = torch.zeros_like(p_BTE).scatter(-1, best.indices, best.values)
    if getattr(config, "norm_topk_prob", True):
        chosen_BTE = chosen_BTE / chosen_BTE.sum(-1, keepdim=True)
    added: Any = sum(chosen_BTE[..., e, None] * output for e, output in enumerate(outputs))
    return added + _shared(op, resident, unit_BTD) if hasattr(resident.layers[0].mlp, "shared_expert") else added


def _shared(op: Concat, resident: LoadedModel, unit_BTD: Tensor) -> Tensor:
    """The average of the shared experts, each with its norm in its rows, times the average of their gates."""

    def mean(name: str, *, reads: bool) -> Tensor:
        total: Any = sum(
            cut.weights["mlp"]
            * _tensor(resident, cut, f"{name}.weight")
            * (_tensor(resident, cut, "post_attention_layernorm.weight") if reads else 1.0)
            for cut in op.cuts
        )
        return total

    gate, up, down = (mean(f"mlp.shared_expert.{name}_proj", reads=name != "down") for name in ("gate", "up", "down"))
    inner = torch.nn.functional.silu(unit_BTD @ gate.T) * (unit_BTD @ up.T)
    opened = torch.sigmoid(unit_BTD @ mean("mlp.shared_expert_gate", reads=True).T)
    return opened * (inner @ down.T)
