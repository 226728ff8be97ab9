"""DARE: differences with entries dropped at random, added up or put through TIES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from intarsia.building.operators.linear import wide
from intarsia.building.operators.task_arithmetic import task_arithmetic
from intarsia.building.operators.ties import disjoint_mean
from intarsia.recipe.methods import Bounds
from intarsia.registry import merge_op

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SEARCH = {"density": (0.1, 0.9), "lambda": (0.0, 1.5)}


@merge_op("dare_linear", needs_base=True, search=_SEARCH, paper="2311.03099")
def dare_linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    generators: Sequence[torch.Generator],
    density: Annotated[float, Bounds(0.0, 1.0, open=True)] = 0.5,
) -> Tensor:
    """DARE, then task arithmetic: base + sum_i w_i drop(D_i); nothing is dropped of vectors."""
    if base.ndim == 1:
        return task_arithmetic(tensors, weights, base)
    start = wide(base)
    total = start.clone()
    for tensor, weight, generator in zip(tensors, weights, generators, strict=True):
        total.add_(drop(wide(tensor) - start, density, generator), alpha=weight)
    return total.to(base.dtype)


@merge_op("dare_ties", needs_base=True, weights="positive", search=_SEARCH, paper="2311.03099")
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
    """Each entry stays with probability `density`, and is then divided by it."""
    import torch

    if density >= 1.0:
        return delta
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, 0.0)
