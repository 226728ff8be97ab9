"""From statistics to scores of layers and pieces. Pure functions.

Shape suffixes: `C` channels of a part, `D` residual width, `P` pieces of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia.architecture.spec import Architecture, Part
from intarsia.calibration.stats import ChannelSums


def channel_sensitivity(activation_C: Tensor, weight_DC: Tensor) -> Tensor:
    """S_c = E[|x_c|] * sum_r |W_{r,c}| (arXiv 2510.15304), float64 `[C]`.

    Args:
        activation_C: the size of channel c of the input of the read-out matrix (mean absolute value as published).
        weight_DC: the read-out matrix (o_proj or down_proj).
    """
    return activation_C.double() * weight_DC.abs().sum(dim=0, dtype=torch.float32).double().to(activation_C.device)


def piece_scores(sensitivity_C: Tensor, architecture: Architecture, part: Part) -> Tensor:
    """A piece's score is the mean over its channels: `[P]`.

    Channels of o_proj lie by query head, and the query heads of a KV group are consecutive, so the channels of a
    group are one run.
    """
    return sensitivity_C.reshape(architecture.n_pieces(part), -1).mean(dim=1)


def part_scores(
    sums: ChannelSums, module: nn.Module, architecture: Architecture, part: Part, *, l2: bool = False
) -> Tensor:
    """The score of every piece of a layer's part, `[P]`.

    S_c is the mean size (sum of absolute values) of what channel c adds to the residual stream. An expert's score is
    the same of what the expert adds, router weight included, and 0 at tokens that are not routed to it; that is what
    the taps measure of it (`intarsia.calibration.taps`).

    Args:
        sums: of the read-out's inputs, as the taps see them.
        l2: root mean squares instead of means.
    """
    activation_C = sums.root_mean_square_C if l2 else sums.mean_absolute_C
    if architecture.is_mixture(part):
        return activation_C
    weight = module.get_submodule(architecture.writer(part).module).weight
    assert isinstance(weight, Tensor)
    return piece_scores(channel_sensitivity(activation_C, weight), architecture, part)


def angular_distance(cosine: Tensor) -> Tensor:
    """arccos(cos) / pi, between 0 and 1 (arXiv 2403.17887)."""
    return torch.arccos(cosine.double()) / torch.pi
