"""Task arithmetic: weighted differences to the base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from intarsia.building.operators.linear import wide
from intarsia.registry import merge_op

if TYPE_CHECKING:
    from torch import Tensor


@merge_op("task_arithmetic", needs_base=True, search={"lambda": (0.0, 1.5)}, paper="2212.04089")
def task_arithmetic(tensors: Iterable[Tensor], weights: Iterable[float], base: Tensor) -> Tensor:
    """Task arithmetic: base + sum_i w_i D_i, with D_i = tensors[i] - base."""
    start = wide(base)
    total = start.clone()
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(wide(tensor) - start, alpha=weight)
    return total.to(base.dtype)
