"""Combining whole tensors by weight arithmetic. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


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
