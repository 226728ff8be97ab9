"""From statistics to scores of layers and pieces. Pure functions.

Shape suffixes: `C` channels of a part, `D` residual width, `P` pieces of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.anatomy.spec import Anatomy, Part


def channel_sensitivity(activation_C: Tensor, weight_DC: Tensor) -> Tensor:
    """S_c = E[|x_c|] * sum_r |W_{r,c}| (arXiv 2510.15304), float64 `[C]`.

    Args:
        activation_C: the size of channel c of the input of the read-out matrix (mean absolute value as published).
        weight_DC: the read-out matrix (o_proj or down_proj).
    """
    return activation_C.double() * weight_DC.abs().sum(dim=0, dtype=torch.float32).double().to(activation_C.device)


def piece_scores(sensitivity_C: Tensor, anatomy: Anatomy, part: Part) -> Tensor:
    """A piece's score is the mean over its channels: `[P]`.

    Channels of o_proj lie by query head, and the query heads of a KV group are consecutive, so the channels of a
    group are one run.
    """
    return sensitivity_C.reshape(anatomy.n_pieces(part), -1).mean(dim=1)


def angular_distance(cosine: Tensor) -> Tensor:
    """arccos(cos) / pi, between 0 and 1 (arXiv 2403.17887)."""
    return torch.arccos(cosine.double()) / torch.pi
