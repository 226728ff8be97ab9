"""What the experts of a mixture add, one by one, from the definition. Shape suffixes: `N` tokens, `E` experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sizes_of_experts(layer: Any, x_ND: Tensor, config: Any) -> Tensor:
    """Sum of absolute values of what each expert adds to each token, `[N, E]`: 0 where it is not chosen.

    Args:
        x_ND: what the layer's MLP reads.
    """
    p_NE = (x_ND @ layer.mlp.gate.weight.T).softmax(-1)
    best = p_NE.topk(config.num_experts_per_tok)
    chosen_NE = torch.zeros_like(p_NE).scatter(-1, best.indices, best.values)
    if getattr(config, "norm_topk_prob", True):
        chosen_NE = chosen_NE / chosen_NE.sum(-1, keepdim=True)
    found = []
    for expert, (both, down) in enumerate(
        zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True)
    ):
        gate, up = (x_ND @ half.T for half in both.chunk(2))
        added = (torch.nn.functional.silu(gate) * up) @ down.T * chosen_NE[:, expert, None]
        found.append(added.abs().sum(-1))
    return torch.stack(found, dim=-1)
