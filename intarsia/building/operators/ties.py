"""TIES: trim differences, elect signs, average what agrees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np

from intarsia.building.operators.linear import wide
from intarsia.recipe.methods import Bounds
from intarsia.registry import merge_op

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1e-9  # A share such as 0.3 * 10 must not lose an entry to rounding.


@merge_op(
    "ties",
    needs_base=True,
    weights="positive",
    search={"density": (0.1, 0.9), "lambda": (0.0, 1.5)},
    paper="2306.01708",
)
def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    density: Annotated[float, Bounds(0.0, 1.0, open=True)] = 0.2,
    lambda_: Annotated[float, Bounds(-100.0, 100.0)] = 1.0,
) -> Tensor:
    """TIES: base + lambda * disjoint mean of the trimmed differences; those of vectors are not trimmed."""
    start = wide(base)
    trimmed = [trim(wide(tensor) - start, 1.0 if base.ndim == 1 else density) for tensor in tensors]
    return (start + lambda_ * disjoint_mean(trimmed, weights)).to(base.dtype)


def trim(delta: Tensor, density: float) -> Tensor:
    """The `density` share of entries of largest magnitude (at least one); zeros for the others."""
    import torch

    keep = math.ceil(density * delta.numel() - EXACT)
    if keep >= delta.numel():
        return delta
    size = delta.abs()
    return torch.where(size >= smallest(size, delta.numel() - keep), delta, 0.0)


def smallest(size: Tensor, index: int) -> float:
    """The entry that stands at `index` (from 0) when they are sorted, the least first."""
    # numpy partitions a hundred times faster than torch's kthvalue finds an entry.
    return float(np.partition(size.reshape(-1).cpu().numpy(), index)[index])


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sign election and disjoint mean of TIES.

    An entry's elected sign is that of sum_i w_i D_i; its value is the mean, weighted by w_i, of those D_i that are not
    0 and have this sign. Where no sign has the majority it is 0. With equal weights this is the paper's formula.
    """
    import torch

    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    sign = total.sign_()
    upper, lower = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta * sign > 0).to(delta.dtype)
        upper.addcmul_(delta, agrees, value=weight)
        lower.add_(agrees, alpha=weight)
    return upper.div_(lower.masked_fill_(lower == 0, 1.0))
