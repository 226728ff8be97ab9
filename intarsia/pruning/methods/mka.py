"""MKA: repeatedly merge the last two layers, weighted by the similarity of their outputs.

Source: Liu et al., Pruning via Merging, EMNLP 2024 (main 987), arXiv 2406.16330. The layer's outputs on the calibration
tokens are embedded by a diffusion map; the similarity of two layers is the mutual information of their embeddings over
the geometric mean of their entropies (normalised pairwise information bottleneck), S_lm = I(l; m) / sqrt(H(l) H(m));
the merged layer is S_lm * theta_l + (1 - S_lm) * theta_m, l the earlier one. Similarities are measured once, on the
whole model; a merged layer counts as the first of its layers.

Deviations. Samples are hidden states of at most 512 tokens, evenly spaced over the calibration set (published: prompts
of one task). The kernel is exp(-d^2 / median d^2), which suits every width (published code: one fixed bandwidth).
Entropies and mutual information are those of equally filled cells of the embedding, so that S_ll is 1 and nothing
exceeds 1 (published code: nearest neighbours, without these properties). The weight is S_lm as in the paper; the
published code takes a sigmoid, which hardly depends on it. Norms are merged like all weights (published code: the
earlier layer's norms). If the last two layers have different attention types, the deepest two adjacent layers of one
type are merged.

Shape suffixes: `S` samples, `D` residual width, `E` embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from intarsia.pruning.step import Planner, Step, one_attention_type
from intarsia.recipe.algebra import merge_of
from intarsia.registry import planner

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.pruning.intermediate import Intermediate

SAMPLES = 512
COORDINATES = 2
"""Dimensions of the diffusion map, as in the published code."""

_DENSITY = 0.5
_SAMPLES_A_CELL = 5


@planner("mka", paper="2406.16330")
class Mka(Planner):
    """Merge from the end, weighted by the similarity of the two layers."""

    joins = True

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Merge the deepest two adjacent layers of one attention type."""
        similarities: list[float] = history[0]["similarities"] if history else adjacent_similarities(model)
        for start in reversed(range(model.depth - 1)):
            pair = model.ops[start : start + 2]
            if not one_attention_type(model, pair):
                continue
            earlier = max(source.layer for source in pair[0].sources)
            weight = similarities[earlier]
            evidence: dict[str, Any] = {"merged": [str(op.sources[0]) for op in pair], "similarity": weight}
            if not history:
                evidence["similarities"] = similarities
            return Step(start=start, count=2, op=merge_of(pair, [weight, 1.0 - weight]), evidence=evidence)
        return None

    def reason(self) -> str:
        return "layers of different attention types are not merged, and no others are adjacent"


def adjacent_similarities(model: Intermediate) -> list[float]:
    """S of the outputs of layers l and l + 1, for l = 0 .. L-2."""
    keep_NT = _spread(model.corpus.input_ids, model.corpus.mask)
    cells = [
        cells_of(diffusion_map(model.tokens_at(index + 1, keep_NT).double(), COORDINATES))
        for index in range(model.depth)
    ]
    return [normalised_information(first, second) for first, second in pairwise(cells)]


def diffusion_map(x_SD: Tensor, coordinates: int) -> Tensor:
    """The leading coordinates of the diffusion map of samples, `[S, E]` float64."""
    import torch

    squared_SS = torch.cdist(x_SD, x_SD, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart = squared_SS[squared_SS > 0]
    scale = float(apart.median()) if apart.numel() else 1.0
    kernel_SS = torch.exp(-squared_SS / scale)
    density_S = kernel_SS.sum(dim=0)
    kernel_SS = kernel_SS / torch.outer(density_S, density_S) ** _DENSITY
    root_S = kernel_SS.sum(dim=0).sqrt()
    values, vectors = torch.linalg.eigh(kernel_SS / torch.outer(root_S, root_S))
    values, vectors = values.flip(0), vectors.flip(1)
    return (vectors[:, 1 : coordinates + 1] / vectors[:, :1]) * values[1 : coordinates + 1]


def cells_of(x_SE: Tensor) -> Tensor:
    """The cell of each sample, `[S]`: every coordinate is cut into equally filled parts.

    The number of parts leaves a few samples for each pair of cells of two layers, and is at least two.
    """
    import torch

    samples, coordinates = x_SE.shape
    parts = max(2, int((samples / _SAMPLES_A_CELL) ** (0.5 / max(coordinates, 1))))
    ranks_SE = x_SE.argsort(dim=0, stable=True).argsort(dim=0, stable=True)
    cells_SE = ranks_SE * parts // samples
    cells_S = torch.zeros(samples, dtype=torch.int64)
    for coordinate in range(coordinates):
        cells_S = cells_S * parts + cells_SE[:, coordinate]
    return cells_S


def normalised_information(first_S: Tensor, second_S: Tensor) -> float:
    """I(first; second) / sqrt(H(first) H(second)) of two labellings of the same samples; 1 if one is constant."""
    joint = float(_entropy(first_S * (int(second_S.max()) + 1) + second_S))
    first, second = _entropy(first_S), _entropy(second_S)
    if first <= 0.0 or second <= 0.0:
        return 1.0
    return min(max((first + second - joint) / math.sqrt(first * second), 0.0), 1.0)


def _entropy(cells_S: Tensor) -> float:
    import torch

    counts = torch.bincount(cells_S).double()
    share = counts[counts > 0] / cells_S.numel()
    return float(-(share * share.log()).sum())


def _spread(ids_NT: Tensor, mask_NT: Tensor | None) -> Tensor:
    """True at `SAMPLES` real tokens at most, evenly spaced over all of them."""
    import torch

    keep_NT = torch.ones_like(ids_NT, dtype=torch.bool) if mask_NT is None else mask_NT.clone()
    real = keep_NT.flatten().nonzero()[:, 0]
    chosen = real[torch.arange(min(SAMPLES, real.numel())) * real.numel() // min(SAMPLES, real.numel())]
    keep_NT.fill_(False)
    keep_NT.view(-1)[chosen] = True
    return keep_NT
