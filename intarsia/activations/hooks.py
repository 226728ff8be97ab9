"""Hooks on output projections: their inputs, as the architecture names them.

The MLP of a mixture has no single output projection. Reported is how much every expert adds to the residual stream: the
sum of absolute values of its output, times its router weight. The experts are run once more for this, one at a time,
with the routing that the model chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.architecture.spec import PARTS, Architecture, Part

Receive = Callable[[Part, Tensor], None]


def writer_of(module: nn.Module, part: Part, architecture: Architecture) -> tuple[str, float] | None:
    """The output projection of a part of a layer, and what its output is multiplied by before the residual sum.

    Where layers can only be removed: the last linear module that is known to write to the residual stream (`mlp`), and
    the one before it (`attention`); None where a layer has none.
    """
    if architecture.inspected is None:
        return architecture.writer(part).module, architecture.residual_scale
    names = {name for name, _ in module.named_modules()}
    own = [(name, scale) for name, scale in (architecture.inspected.writers or {}).items() if name in names]
    place = 1 if part == "mlp" else 2
    return own[-place] if len(own) >= place else None


@contextmanager
def output_projections(
    layer: nn.Module, architecture: Architecture, receive: Receive, parts: Sequence[Part] = PARTS
) -> Iterator[None]:
    """While open, every forward of `layer` hands the inputs of o_proj and down_proj to `receive`.

    The inputs are `[..., C]` with C the query-head channels (attention) or the MLP channels. Of a mixture it is
    `[tokens, experts]`, what each expert adds.
    """
    handles = []
    for part in parts:

        def hook(module: nn.Module, args: tuple[Any, ...], part: Part = part) -> None:
            receive(part, args[0])

        def routed(module: nn.Module, args: tuple[Any, ...], part: Part = part) -> None:
            receive(part, added_by_experts(module, *args, experts=architecture.n_experts))

        writer = writer_of(layer, part, architecture)
        if architecture.is_mixture(part):
            target = layer.get_submodule(architecture.family.modules.experts)
            handles.append(target.register_forward_pre_hook(routed))
        elif writer is not None:
            target = layer.get_submodule(writer[0])
            handles.append(target.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added_by_experts(module: nn.Module, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, *, experts: int) -> Tensor:
    """Sum of absolute values of what each expert adds at each token, `[N, experts]`; 0 where it is not chosen.

    Args:
        module: runs the experts on tokens `x_ND`, with the K that are chosen for each and their weights.
    """
    sizes = torch.zeros(x_ND.shape[0], experts, dtype=torch.float32, device=x_ND.device)
    for expert in index_NK.unique().tolist():
        rows, places = torch.where(index_NK == expert)
        # Past the hooks: this is no forward of the layer.
        out = module.forward(x_ND[rows], index_NK[rows, places][:, None], weight_NK[rows, places][:, None])
        sizes[rows, expert] = out.abs().sum(dim=-1, dtype=torch.float32)
    return sizes
