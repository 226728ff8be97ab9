"""Model stock: how far to go from the base to the mean, by the angle between differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from intarsia.building.operators.linear import wide
from intarsia.registry import merge_op

if TYPE_CHECKING:
    from torch import Tensor


@merge_op("model_stock", needs_base=True, sources=(2, None), weights="equal", paper="2403.19522")
def model_stock(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
    """Model stock, one tensor at a time: t * mean(tensors) + (1 - t) * base.

    With cos the mean cosine between two differences to the base: t = k cos / (1 + (k - 1) cos), k tensors. The paper
    has no case for differences that point apart; t is then 0, as it is at right angles. A difference of zero is at
    right angles to any.
    """
    import torch

    if len(tensors) < 2:
        raise ValueError("model stock needs at least two tensors, between which there is an angle")
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
