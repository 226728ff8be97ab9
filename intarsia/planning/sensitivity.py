"""Piece scores of a whole model in few numbers, kept for people to look at. Pure functions.

Shape suffixes: `C` channels of a layer, sorted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from intarsia.architecture.spec import Part

BINS = 48


def sensitivity_map(layers: Iterable[Mapping[Part, Tensor]]) -> dict[str, list[list[float]]]:
    """By layer: the score of every KV group, and the means of `BINS` equal parts of the channels from the least
    sensitive to the most (of every channel, where a layer has no more than that)."""
    groups, channels = [], []
    for scores in layers:
        groups.append([_digits(value) for value in scores["attention"].tolist()])
        sorted_C = scores["mlp"].double().sort().values
        parts = torch.tensor_split(sorted_C, min(BINS, len(sorted_C)))
        channels.append([_digits(float(part.mean())) for part in parts])
    return {"kv_groups": groups, "channels": channels}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
