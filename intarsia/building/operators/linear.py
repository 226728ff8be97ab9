"""The weighted sum, and the dtype in which all operators compute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from intarsia.registry import merge_op

if TYPE_CHECKING:
    from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which merging computes: float32 or better."""
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
