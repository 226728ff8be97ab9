"""Model breadcrumbs: differences without their smallest and largest entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from intarsia.building.operators.linear import wide
from intarsia.building.operators.task_arithmetic import task_arithmetic
from intarsia.building.operators.ties import EXACT, smallest
from intarsia.recipe.methods import Bounds
from intarsia.registry import merge_op

if TYPE_CHECKING:
    from torch import Tensor

_OUTLIERS = 0.01  # The share of largest entries that a search leaves out.


def _by_density(searched: Mapping[str, float]) -> dict[str, float]:
    """A search chooses how much is kept, and always leaves out the outliers."""
    return {"bottom": max(round(1.0 - searched["density"] - _OUTLIERS, 6), 0.0), "top": _OUTLIERS}


def _leaves_something(params: Mapping[str, float]) -> str | None:
    total = params.get("bottom", 0.0) + params.get("top", 0.0)
    return None if total < 1.0 else "bottom and top that leave something (below 1 together)"


@merge_op(
    "breadcrumbs",
    needs_base=True,
    search={"density": (0.1, 0.9), "lambda": (0.0, 1.5)},
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
    total = start.clone()
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(without_extremes(wide(tensor) - start, bottom=bottom, top=top), alpha=weight)
    return total.to(base.dtype)


def without_extremes(delta: Tensor, *, bottom: float, top: float) -> Tensor:
    """Zeros for the `bottom` share of entries of least magnitude and the `top` share of largest."""
    import torch

    size, count = delta.abs(), delta.numel()
    low, high = (int(share * count + EXACT) for share in (bottom, top))
    if low + high >= count:
        raise ValueError("bottom and top leave nothing")
    kept = size >= smallest(size, low)
    if high:
        kept &= size <= smallest(size, count - high - 1)
    return torch.where(kept, delta, 0.0)
