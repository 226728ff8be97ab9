"""Merge operators: weight arithmetic over tensors of one shape.

Each is registered with `intarsia.registry.merge_op`; recipes, the search space and `build` read its parameters from the
signature. The help imports this module, so torch is imported inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np

from intarsia.recipe.methods import Bounds
from intarsia.registry import merge_op

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of merging: float32 or better."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@merge_op("linear", sources=(0, None), search={"lead": (0.1, 0.9)})
def linear(tensors: Iterable[Tensor], weights: Iterable[float], base: Tensor | None = None) -> Tensor:
    """The weighted sum of tensors, accumulated in float32 or better, in the first one's dtype."""
    import torch

    total: Tensor | None = None
    dtype = torch.float32
    for tensor, weight in zip(tensors, weights, strict=True):
        if total is None:
            dtype = tensor.dtype
            total = torch.zeros_like(tensor, dtype=torch.promote_types(dtype, torch.float32))
        total.add_(tensor.to(total.dtype), alpha=weight)
    if total is None:
        raise ValueError("linear needs at least one tensor")
    return total.to(dtype)


_PARALLEL = 1e-6  # Least 1 - |cos|: below it, sines are too small to divide by.


@merge_op("slerp", sources=(2, 2), weights="sum 1", search={"lead": (0.1, 0.9)})
def slerp(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """Spherical interpolation (Shoemake, SIGGRAPH 1985) of two matrices; of vectors the weighted sum.

    With A the angle between them as vectors, and t the second weight: sin((1-t) A) / sin(A) * first + sin(t A) / sin(A)
    * second. They keep their lengths. If A is undefined (a zero tensor), or too near 0 or pi to define an arc, it is
    the straight line between them.
    """
    first, second = tensors
    if first.ndim == 1:
        return linear(tensors, weights)
    t, a, b = weights[1], wide(first), wide(second)
    length = float(a.double().norm()) * float(b.double().norm())
    cosine = float((a.double() * b.double()).sum()) / length if length > 0.0 else 1.0
    if 1.0 - abs(cosine) < _PARALLEL:
        return ((1.0 - t) * a + t * b).to(first.dtype)
    angle = math.acos(cosine)
    left, right = (math.sin(share * angle) / math.sin(angle) for share in (1.0 - t, t))
    return (left * a + right * b).to(first.dtype)


@merge_op("task_arithmetic", needs_base=True, search={"lambda": (0.0, 1.5)}, paper="2212.04089")
def task_arithmetic(tensors: Iterable[Tensor], weights: Iterable[float], base: Tensor) -> Tensor:
    """Task arithmetic: base + sum_i w_i D_i, with D_i = tensors[i] - base."""
    start = wide(base)
    return _plus(start, (wide(tensor) - start for tensor in tensors), weights).to(base.dtype)


def _plus(start: Tensor, deltas: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """start + sum_i w_i D_i."""
    total = start.clone()
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


_BY_DENSITY = {"density": (0.1, 0.9), "lambda": (0.0, 1.5)}
EXACT = 1e-9  # A share such as 0.3 * 10 must not lose an entry to rounding.


@merge_op(
    "ties",
    needs_base=True,
    weights="positive",
    search=_BY_DENSITY,
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
    """TIES: base + lambda * disjoint mean of the trimmed differences; vectors are not trimmed."""
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
    """The entry at `index` (from 0) of the ascending order."""
    # numpy partitions a hundred times faster than torch's kthvalue finds an entry.
    return float(np.partition(size.reshape(-1).cpu().numpy(), index)[index])


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sign election and disjoint mean of TIES.

    An entry's elected sign is that of sum_i w_i D_i; its value is the mean, weighted by w_i, of those nonzero D_i with
    this sign, or 0 without a majority. With equal weights this is the paper's formula.
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


@merge_op("dare_linear", needs_base=True, search=_BY_DENSITY, paper="2311.03099")
def dare_linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    generators: Sequence[torch.Generator],
    density: Annotated[float, Bounds(0.0, 1.0, open=True)] = 0.5,
) -> Tensor:
    """DARE, then task arithmetic: base + sum_i w_i drop(D_i); vectors are not dropped."""
    if base.ndim == 1:
        return task_arithmetic(tensors, weights, base)
    start, pairs = wide(base), zip(tensors, generators, strict=True)
    dropped = (drop(wide(tensor) - start, density, generator) for tensor, generator in pairs)
    return _plus(start, dropped, weights).to(base.dtype)


@merge_op("dare_ties", needs_base=True, weights="positive", search=_BY_DENSITY, paper="2311.03099")
def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    generators: Sequence[torch.Generator],
    density: Annotated[float, Bounds(0.0, 1.0, open=True)] = 0.5,
    lambda_: Annotated[float, Bounds(-100.0, 100.0)] = 1.0,
) -> Tensor:
    """DARE in place of the trimming, then the other steps of TIES: base + lambda * disjoint mean of drop(D_i)."""
    start = wide(base)
    share = 1.0 if base.ndim == 1 else density
    dropped = [
        drop(wide(tensor) - start, share, generator) for tensor, generator in zip(tensors, generators, strict=True)
    ]
    return (start + lambda_ * disjoint_mean(dropped, weights)).to(base.dtype)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`, and divide it by `density`."""
    import torch

    if density >= 1.0:
        return delta
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, 0.0)


_OUTLIERS = 0.01  # Share of largest entries that a search drops.


def _by_density(searched: Mapping[str, float]) -> dict[str, float]:
    """Convert the searched density: outliers are always dropped."""
    return {"bottom": max(round(1.0 - searched["density"] - _OUTLIERS, 6), 0.0), "top": _OUTLIERS}


def _leaves_something(params: Mapping[str, float]) -> str | None:
    total = params.get("bottom", 0.0) + params.get("top", 0.0)
    return None if total < 1.0 else "bottom and top with a sum below 1"


@merge_op(
    "breadcrumbs",
    needs_base=True,
    search=_BY_DENSITY,
    settle=_by_density,
    rule=_leaves_something,
    paper="2312.06795",
)
def breadcrumbs(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    bottom: Annotated[float, Bounds(0.0, 1.0)] = 0.85,
    top: Annotated[float, Bounds(0.0, 1.0)] = 0.01,
) -> Tensor:
    """Model breadcrumbs: base + sum_i w_i (D_i without its smallest and largest entries); all entries of vectors."""
    if base.ndim == 1:
        return task_arithmetic(tensors, weights, base)
    start = wide(base)
    kept = (without_extremes(wide(tensor) - start, bottom=bottom, top=top) for tensor in tensors)
    return _plus(start, kept, weights).to(base.dtype)


def without_extremes(delta: Tensor, *, bottom: float, top: float) -> Tensor:
    """Set the `bottom` share of smallest entries and the `top` share of largest ones to zero."""
    import torch

    size, count = delta.abs(), delta.numel()
    low, high = (int(share * count + EXACT) for share in (bottom, top))
    if low + high >= count:
        raise ValueError("bottom and top drop everything")
    kept = size >= smallest(size, low)
    if high:
        kept &= size <= smallest(size, count - high - 1)
    return torch.where(kept, delta, 0.0)


@merge_op("model_stock", needs_base=True, sources=(2, None), weights="equal", paper="2403.19522")
def model_stock(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
    """Model stock, one tensor at a time: t * mean(tensors) + (1 - t) * base.

    With cos the mean cosine between two differences to the base: t = k cos / (1 + (k - 1) cos), k tensors. The paper
    does not cover differences at obtuse angles; t is then 0, as at right angles. A zero difference counts as at right
    angles to any.
    """
    import torch

    if len(tensors) < 2:
        raise ValueError("model stock needs at least two tensors")
    start = wide(base)
    deltas = [wide(tensor) - start for tensor in tensors]
    count = len(deltas)
    lengths = [float(delta.double().norm()) for delta in deltas]
    cosines = [
        float((deltas[i].double() * deltas[j].double()).sum()) / (lengths[i] * lengths[j])
        if lengths[i] * lengths[j] > 0.0
        else 0.0
        for i in range(count)
        for j in range(i)
    ]
    cosine = max(sum(cosines) / len(cosines), 0.0)
    t = count * cosine / (1.0 + (count - 1) * cosine)
    return (start + (t / count) * torch.stack(deltas).sum(dim=0)).to(base.dtype)
