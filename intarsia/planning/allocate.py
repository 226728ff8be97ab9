"""From ratios to counts to indices. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def ratios(influences: Sequence[float], sharpness: float = 1.0) -> list[float]:
    """Shares proportional to influence^sharpness; equal shares where no layer has any influence."""
    largest = max(influences)
    if largest <= 0.0:
        return [1.0 / len(influences)] * len(influences)
    # Relative to the largest, so that a great sharpness does not make zeros of them all.
    powers = [(max(influence, 0.0) / largest) ** sharpness for influence in influences]
    total = sum(powers)
    return [power / total for power in powers]


def dominate(shares: Sequence[float], floor: float) -> list[float]:
    """Raise the largest share to at least `floor`; the others shrink in proportion."""
    largest = max(range(len(shares)), key=lambda index: shares[index])
    if shares[largest] >= floor:
        return list(shares)
    rest = 1.0 - shares[largest]
    return [floor if index == largest else share * (1.0 - floor) / rest for index, share in enumerate(shares)]


def counts(shares: Sequence[float], total: int) -> list[int]:
    """Floor of each share of `total`, with the remainder to the largest share (the first, where several are)."""
    # A share like 0.3 * 10 must not lose a piece to rounding.
    whole = [int(share * total + 1e-9) for share in shares]
    largest = max(range(len(shares)), key=lambda index: shares[index])
    whole[largest] += total - sum(whole)
    return whole


def top(scores_P: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` highest scores, ascending; of equal scores the lower index is kept."""
    order = torch.sort(scores_P.double(), descending=True, stable=True).indices
    return tuple(sorted(int(index) for index in order[:count]))


def share_grid(layers: int, granularity: int) -> Iterator[list[float]]:
    """Every way to split 1 into `layers` shares that are multiples of 1/granularity."""
    for whole in _compositions(layers, granularity):
        yield [part / granularity for part in whole]


def _compositions(parts: int, total: int) -> Iterator[list[int]]:
    if parts == 1:
        yield [total]
        return
    for first in range(total, -1, -1):
        for rest in _compositions(parts - 1, total - first):
            yield [first, *rest]
