"""Combining whole tensors by weight arithmetic. Pure functions.

Everything is computed in float32 (float64 for float64 tensors) and rounded once, to the first tensor's dtype.
Methods on differences take them to `base`, the tensor of the base model at the same layer index. Those that leave
entries out are in `merging_sparse`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_PARALLEL = 1e-6  # Of 1 - |cos|: below it sines are too small to divide by.


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which merging computes: float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def linear(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """The weighted sum of tensors of one shape, accumulated in float32 or better, in the first one's dtype."""
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


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Spherical interpolation (Shoemake, SIGGRAPH 1985): `t` = 0 gives the first tensor, 1 the second.

    With A the angle between the tensors as vectors: sin((1-t) A) / sin(A) * first + sin(t A) / sin(A) * second. The
    tensors keep their lengths. Where A says nothing (a zero tensor), or is so near 0 or pi that the arc is a point or
    any half circle, it is the straight line between them.
    """
    a, b = wide(first), wide(second)
    length = float(a.double().norm()) * float(b.double().norm())
    cosine = float((a.double() * b.double()).sum()) / length if length > 0.0 else 1.0
    if 1.0 - abs(cosine) < _PARALLEL:
        return ((1.0 - t) * a + t * b).to(first.dtype)
    angle = math.acos(cosine)
    left, right = (math.sin(share * angle) / math.sin(angle) for share in (1.0 - t, t))
    return (left * a + right * b).to(first.dtype)


def task_arithmetic(base: Tensor, tuned: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Task arithmetic (arXiv 2212.04089): base + sum_i weights[i] (tuned[i] - base)."""
    start = wide(base)
    total = start.clone()
    for tensor, weight in zip(tuned, weights, strict=True):
        total.add_(wide(tensor) - start, alpha=weight)
    return total.to(base.dtype)


def model_stock(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """Model stock (arXiv 2403.19522), one tensor at a time: t * mean(tuned) + (1 - t) * base.

    With cos the mean cosine between two differences to the base: t = k cos / (1 + (k - 1) cos), k tensors. The paper
    has no case for differences that point apart; t is then 0, as it is at right angles. A difference of zero is at
    right angles to any.
    """
    if len(tuned) < 2:
        raise ValueError("model stock needs at least two tensors, between which there is an angle")
    start = wide(base)
    deltas = [wide(tensor) - start for tensor in tuned]
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
