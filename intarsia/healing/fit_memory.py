"""What fitting one output projection takes in memory: bytes of tensors, beside the layer and the batch."""

from __future__ import annotations

_WIDE = 8  # bytes of an entry of the moments


def gram_bytes(features: int, width: int) -> int:
    """The moments of one output projection."""
    return _WIDE * features * (features + width)


def fit_bytes(features: int, width: int, **_: object) -> int:
    """The most that is there at once while an output projection is fitted: two Grams and a factor."""
    return 2 * gram_bytes(features, width) + 2 * _WIDE * features * features
