"""Merging differences to a base of which entries are left out: TIES, DARE and breadcrumbs. Pure functions.

The papers rank the entries of a whole model; here, as tensors are made one at a time, each tensor's own are ranked. Of
entries of equal size at a threshold all stay, so that their order in memory decides nothing.

`D` in a comment is the difference of a fine-tuned tensor to the base's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from intarsia.building.merging import wide

_EXACT = 1e-9  # A share such as 0.3 * 10 must not lose an entry to rounding.


def trim(delta: Tensor, density: float) -> Tensor:
    """The `density` share of entries of largest magnitude (at least one); zeros for the others."""
    keep = math.ceil(density * delta.numel() - _EXACT)
    if keep >= delta.numel():
        return delta
    size = delta.abs()
    return torch.where(size >= _smallest(size, delta.numel() - keep), delta, 0.0)


def without_extremes(delta: Tensor, *, bottom: float, top: float) -> Tensor:
    """Zeros for the `bottom` share of entries of least magnitude and the `top` share of largest (arXiv 2312.06795)."""
    size, count = delta.abs(), delta.numel()
    low, high = (int(share * count + _EXACT) for share in (bottom, top))
    if low + high >= count:
        raise ValueError("bottom and top leave nothing")
    kept = size >= _smallest(size, low)
    if high:
        kept &= size <= _smallest(size, count - high - 1)
    return torch.where(kept, delta, 0.0)


def _smallest(size: Tensor, index: int) -> float:
    """The entry that stands at `index` (from 0) when they are sorted, the least first."""
    # numpy partitions a hundred times faster than torch's kthvalue finds an entry.
    return float(np.partition(size.reshape(-1).cpu().numpy(), index)[index])


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (arXiv 2311.03099): each entry stays with probability `density`, and is then divided by it."""
    if density >= 1.0:
        return delta
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, 0.0)


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A generator that is the same whenever the seed and the names are, whatever was drawn before."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sign election and disjoint mean of TIES (arXiv 2306.01708).

    An entry's elected sign is that of sum_i w_i D_i; its value is the mean, weighted by w_i, of those D_i that are not
    0 and have this sign. Where no sign has the majority it is 0. With equal weights this is the paper's formula.
    """
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


def ties(base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], *, density: float, scale: float) -> Tensor:
    """TIES (arXiv 2306.01708): trim each difference, elect signs, disjoint mean; base + scale * mean."""
    start = wide(base)
    trimmed = [trim(wide(tensor) - start, density) for tensor in tuned]
    return (start + scale * disjoint_mean(trimmed, weights)).to(base.dtype)


def dare_linear(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """DARE, then task arithmetic (arXiv 2311.03099): base + sum_i w_i drop(D_i). One generator for each tensor."""
    start = wide(base)
    total = start.clone()
    for tensor, weight, generator in zip(tuned, weights, generators, strict=True):
        total.add_(drop(wide(tensor) - start, density, generator), alpha=weight)
    return total.to(base.dtype)


def dare_ties(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """DARE in place of the trimming, then the other steps of TIES: base + scale * disjoint_mean(drop(D_i))."""
    start = wide(base)
    dropped = [
        drop(wide(tensor) - start, density, generator) for tensor, generator in zip(tuned, generators, strict=True)
    ]
    return (start + scale * disjoint_mean(dropped, weights)).to(base.dtype)


def breadcrumbs(
    base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], *, bottom: float, top: float
) -> Tensor:
    """Model breadcrumbs (arXiv 2312.06795): base + sum_i w_i (D_i without its smallest and its largest entries)."""
    start = wide(base)
    total = start.clone()
    for tensor, weight in zip(tuned, weights, strict=True):
        total.add_(without_extremes(wide(tensor) - start, bottom=bottom, top=top), alpha=weight)
    return total.to(base.dtype)
