"""Scores of layers and pieces, and the counts and indices that follow from ratios. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from intarsia.architecture.spec import Architecture, Part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from intarsia.activations.statistics import ChannelSums


def channel_sensitivity(activation_C: Tensor, weight_DC: Tensor) -> Tensor:
    """S_c = E[|x_c|] * sum_r |W_{r,c}| (arXiv 2510.15304), float64 `[C]`.

    Args:
        activation_C: the size of channel c of the output projection's input (mean absolute value as published).
        weight_DC: the output projection (o_proj or down_proj).
    """
    import torch

    return activation_C.double() * weight_DC.abs().sum(dim=0, dtype=torch.float32).double().to(activation_C.device)


def piece_scores(sensitivity_C: Tensor, architecture: Architecture, part: Part) -> Tensor:
    """A piece's score is the mean over its channels: `[P]`.

    Channels of o_proj are ordered by query head, and the query heads of a KV group are consecutive, so the channels
    of a group are contiguous.
    """
    return sensitivity_C.reshape(architecture.n_pieces(part), -1).mean(dim=1)


def part_scores(
    sums: ChannelSums, module: nn.Module, architecture: Architecture, part: Part, *, l2: bool = False
) -> Tensor:
    """The score of every piece of a layer's part, `[P]`.

    S_c is the mean L1 norm of channel c's contribution to the residual stream. An expert's score is the mean L1 norm of
    its contribution, router weight included and 0 at tokens that are not routed to it, as the hooks measure it
    (`intarsia.activations.statistics`).

    Args:
        sums: of the output projection's inputs, from the hooks.
        l2: root mean squares instead of means.
    """
    activation_C = sums.root_mean_square_C if l2 else sums.mean_absolute_C
    if architecture.is_mixture(part):
        return activation_C
    weight = module.get_parameter(f"{architecture.writer(part).module}.weight")
    return piece_scores(channel_sensitivity(activation_C, weight), architecture, part)


def angular_distance(cosine: Tensor) -> Tensor:
    """arccos(cos) / pi, between 0 and 1 (arXiv 2403.17887)."""
    return cosine.double().arccos() / math.pi


BINS = 48


def sensitivity_map(layers: Iterable[Mapping[Part, Tensor]]) -> dict[str, list[list[float]]]:
    """By layer: the score of every KV group, and the means over `BINS` equal parts of the channels, sorted by
    sensitivity (single channels if there are no more than that)."""
    groups, channels = [], []
    for scores in layers:
        groups.append([digits(value) for value in scores["attention"].tolist()])
        sorted_C = scores["mlp"].double().sort().values
        parts = sorted_C.tensor_split(min(BINS, len(sorted_C)))
        channels.append([digits(float(part.mean())) for part in parts])
    return {"kv_groups": groups, "channels": channels}


def digits(value: float) -> float:
    """A number in four digits, for a log or a page."""
    return float(f"{value:.4g}")


def ratios(influences: Sequence[float], sharpness: float = 1.0) -> list[float]:
    """Shares proportional to influence^sharpness; equal shares if all influences are 0."""
    largest = max(influences)
    if largest <= 0.0:
        return [1.0 / len(influences)] * len(influences)
    # Relative to the largest, so that a large sharpness does not underflow to zeros.
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
    """Floor of each share of `total`, with the remainder to the largest share (the first of equal ones)."""
    # A share like 0.3 * 10 must not lose a piece to rounding.
    whole = [int(share * total + 1e-9) for share in shares]
    largest = max(range(len(shares)), key=lambda index: shares[index])
    whole[largest] += total - sum(whole)
    return whole


def top(scores_P: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` highest scores, ascending; of equal scores the lower index is kept."""
    order = scores_P.double().sort(descending=True, stable=True).indices
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
