"""What fitting one read-out takes in memory, in formulas: bytes of tensors, beside the layer and the batch.

Held against the bytes that torch allocates in tests/healing/test_fit_memory.py.
"""

from __future__ import annotations

from intarsia.healing.behind_norm import tried
from intarsia.healing.ridge import SOLVED_AT_ONCE, rows_at_most
from intarsia.healing.symmetric import entries

_WIDE = 8  # bytes of an entry of the moments


def gram_bytes(features: int, width: int) -> int:
    """The moments of one read-out: 4.25 bytes for each pair of features, 8 for each feature and output."""
    return _WIDE * (entries(features) + features * width)


def fit_bytes(
    features: int,
    width: int,
    *,
    tokens: int,
    held_out: int,
    itemsize: int,
    in_files: bool = False,
    strengths: int = 0,
) -> int:
    """The most that is there at once while a read-out is fitted.

    Args:
        tokens: of the whole text; every `held_out`-th sequence of it is held out.
        itemsize: of the layer's dtype.
        in_files: what is not needed for a while lies in files, as that of a streamed model does.
        strengths: of a read-out with a norm behind it, how many there are to choose from.
    """
    judged = -(-tokens // held_out)
    fitted = tokens - judged
    by_moments = judged > rows_at_most(features, held_out=True)
    weight = features * width
    if strengths:
        # A change, and a weight for each strength that is tried. Held-out tokens are run once more, and not kept.
        kept, found, columns = 0, 4 * weight + tried(strengths) * itemsize * weight, 1
    else:
        rows = 0 if in_files else judged * (itemsize * features + 4 * width)
        kept, found, columns = gram_bytes(features, width) if by_moments else rows, 8 * weight, 3 if by_moments else 1
    copies = 1 if in_files else 2
    if fitted <= rows_at_most(features):
        each = 4 if strengths else itemsize  # behind a norm features are divided by its size, in float32
        rows = fitted * (each * features + 4 * width)
        kernel = copies * _WIDE * entries(fitted) + (_WIDE + 4) * fitted * width
        products = found if strengths else 8 * fitted * width
        return kept + max(copies * rows, rows + kernel + products)
    solving = copies * _WIDE * entries(features) + (copies - 1) * _WIDE * weight + found
    solving += columns * _WIDE * features * min(width, SOLVED_AT_ONCE)
    return kept + max(gram_bytes(features, width), solving)
