"""Spherical interpolation of two tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from intarsia.building.operators.linear import linear, wide
from intarsia.registry import merge_op

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 1e-6  # Of 1 - |cos|: below it sines are too small to divide by.


@merge_op("slerp", sources=(2, 2), weights="sum 1", search={"lead": (0.1, 0.9)})
def slerp(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """Spherical interpolation (Shoemake, SIGGRAPH 1985) of two matrices; of vectors the weighted sum.

    With A the angle between them as vectors, and t the second weight: sin((1-t) A) / sin(A) * first + sin(t A) / sin(A)
    * second. They keep their lengths. Where A says nothing (a zero tensor), or is so near 0 or pi that the arc is a
    point or any half circle, it is the straight line between them.
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
