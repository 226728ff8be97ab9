"""What the model would be with other layers in the place of some: run from the kept hidden states before them.

The model itself does not change; the layers that are run are counted as its cost.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from intarsia.planning.intermediate import Intermediate
from intarsia.recipe.ops import Op


@torch.inference_mode()
def losses_with(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], *, sequences: slice = slice(None)
) -> Tensor:
    """Summed loss of each sequence if `ops` stood in the place of `count` layers: float64, `[N]` of the slice."""
    outputs = _outputs(model, start, count, ops, sequences)
    return torch.cat([model.stream.losses(h_BTD, ids, mask)[0] for ids, mask, h_BTD in outputs])


@torch.inference_mode()
def normed_with(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], *, sequences: slice = slice(None)
) -> Tensor:
    """What the head would read if `ops` stood in the place of `count` layers: H^L behind the final norm.

    Returns:
        `[N, T, D]` of the slice, in the model's dtype, on the CPU. Padding is zero.
    """
    found = []
    for ids, mask, h_BTD in _outputs(model, start, count, ops, sequences):
        normed = model.stream.final_norm(h_BTD, ids, mask)
        found.append((normed if mask is None else normed.masked_fill(~mask[..., None], 0.0)).cpu())
    return torch.cat(found)


def _outputs(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], sequences: slice
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Tokens, mask and H^L of every batch."""
    chain = list(zip(model.ops, model.modules, strict=True))
    chain[start : start + count] = [(op, model.resident.module(op)) for op in ops]
    first = start if model.reuse_prefix else 0
    for part, ids, mask in model.batches(sequences):
        h_BTD = model.hidden_at(first, part) if model.reuse_prefix else model.stream.enter(ids, mask).h_BTD
        calls = model.stream.calls(ids, mask)
        for op, module in chain[first:]:
            h_BTD = model.stream.run(module, h_BTD, calls[op.sources[0].layer])
        model.spend(len(chain) - first, part)
        yield ids, mask, h_BTD
