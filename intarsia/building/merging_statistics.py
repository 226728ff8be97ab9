"""Merging with statistics of what the models do: RegMean and Fisher averaging. Pure functions.

A recipe holds no statistics, so what these give goes into a recipe as fitted tensors of the layer.

Shape suffixes: `O` rows of a weight (outputs), `I` columns (inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.building.merging import linear, wide


def regmean(
    weights_OI: Sequence[Tensor],
    grams_II: Sequence[Tensor],
    *,
    shares: Sequence[float] | None = None,
    keep: float = 0.9,
) -> Tensor:
    """RegMean (arXiv 2212.09849): the linear layer whose outputs are closest to every source's on its own inputs.

    (sum_i W_i G_i) (sum_i G_i)^-1 for weights `[out, in]`, where G_i is X_i^T X_i of source i's inputs with the entries
    off the diagonal times `keep` (as in the paper, for few inputs). Biases and norms are averaged: use `linear`. An
    input that no source ever used has no answer of its own; its column is the average too.

    Args:
        grams_II: uncentred second moments of each source's inputs; sums or means, but the same for all.
        shares: how much each source counts (1 by default).
    """
    counts = [1.0] * len(weights_OI) if shares is None else list(shares)
    diagonals = torch.stack([gram.diagonal() for gram in grams_II])
    unused = (diagonals == 0).all(dim=0)
    upper: Tensor | None = None
    lower: Tensor | None = None
    for weight, gram, count in zip(weights_OI, grams_II, counts, strict=True):
        shrunk = count * (keep * gram.double() + (1.0 - keep) * torch.diag(gram.diagonal().double()))
        shrunk = shrunk + torch.diag(unused.double() * count)
        product = weight.double() @ shrunk
        upper = product if upper is None else upper + product
        lower = shrunk if lower is None else lower + shrunk
    if upper is None or lower is None:
        raise ValueError("regmean needs at least one weight")
    # Directions that no input has (rank below the width, keep = 1) are solved for by the least change.
    solved = torch.linalg.lstsq(lower, upper.T, driver="gelsd").solution.T
    return solved.to(weights_OI[0].dtype)


def fisher(tensors: Sequence[Tensor], squares: Sequence[Tensor], *, shares: Sequence[float] | None = None) -> Tensor:
    """Fisher averaging (arXiv 2111.09832): sum_i s_i F_i W_i / sum_i s_i F_i, entry by entry.

    Args:
        squares: F_i, the mean squared gradient of each source's loss by each entry (the diagonal of its Fisher
            information).
        shares: s_i, how much each source counts (1 by default). An entry that no loss depends on is averaged by them.
    """
    counts = [1.0] * len(tensors) if shares is None else list(shares)
    dtype = torch.float64
    upper = torch.zeros(tensors[0].shape, dtype=dtype)
    lower = torch.zeros(tensors[0].shape, dtype=dtype)
    for tensor, square, count in zip(tensors, squares, counts, strict=True):
        if bool((square < 0).any()):
            raise ValueError("squared gradients are not negative")
        upper += count * square.to(dtype) * tensor.to(dtype)
        lower += count * square.to(dtype)
    whole = sum(counts)
    plain = wide(linear([wide(tensor) for tensor in tensors], [count / whole for count in counts])).to(dtype)
    return torch.where(lower > 0, upper / torch.where(lower > 0, lower, 1.0), plain).to(tensors[0].dtype)
