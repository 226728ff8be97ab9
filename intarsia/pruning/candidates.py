"""What the model would be with other layers in the place of some: run from the kept hidden states before them.

The model itself does not change; the layers that are run are counted as its cost. Of a model that is streamed a layer
is read once for all changes that are evaluated together; else one change is run after the other, which stores nothing.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from intarsia.activations.loop import Path
from intarsia.building.recipe_layers import Placed
from intarsia.pruning.intermediate import Intermediate
from intarsia.recipe.recipe import Op


@dataclass(frozen=True, kw_only=True)
class Change:
    """`ops` stand in the place of the `count` layers from `start` on."""

    start: int
    count: int
    ops: tuple[Op, ...]


def losses_with(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], *, sequences: slice | None = None
) -> Tensor:
    """Summed loss of each sequence if `ops` stood in the place of `count` layers: float64, `[N]` of the slice.

    Where the model's criterion is `kl`, it is the divergence from the original's next-token distribution.
    """
    return next(losses_of(model, [Change(start=start, count=count, ops=tuple(ops))], sequences=sequences))


def losses_of(model: Intermediate, changes: Sequence[Change], *, sequences: slice | None = None) -> Iterator[Tensor]:
    """`losses_with` of one change after the other."""
    sequences = model.rows if sequences is None else sequences
    expected = model.expected().rows if model.criterion == "kl" else None
    return model.loop.losses((_path(model, change) for change in changes), sequences=sequences, expected=expected)


@torch.inference_mode()
def normed_with(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], *, sequences: slice = slice(None)
) -> Tensor:
    """What the head would read if `ops` stood in the place of `count` layers: H^L after the final norm.

    Returns:
        `[N, T, D]` of the slice, in the model's dtype, on the CPU. Padding is zero.
    """
    found: list[Tensor] = []

    def end(_: int, rows: slice, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
        normed = model.loop.stream.final_norm(h_BTD, ids, mask)
        found.append((normed if mask is None else normed.masked_fill(~mask[..., None], 0.0)).cpu())

    path = _path(model, Change(start=start, count=count, ops=tuple(ops)))
    model.loop.run([path], end, sequences=sequences)
    return torch.cat(found)


def _path(model: Intermediate, change: Change) -> Path:
    """The layers from the change on; all of them where no hidden states are to be reused."""
    new = [Placed(model.resident.module(op), op.sources[0].layer) for op in change.ops]
    rest = [*new, *model.placed(change.start + change.count)]
    if not model.reuse_prefix:
        return Path(layers=[*model.placed(0, change.start), *rest])
    return Path(layers=rest, read=partial(model.hidden_at, change.start))
