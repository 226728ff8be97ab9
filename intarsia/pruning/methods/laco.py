"""LaCo: collapse following layers into a prior one by adding their differences to it.

Source: Yang et al., LaCo, arXiv 2402.11187. A pointer l goes down from the deepest layers. There the C layers from l
on become theta_l + sum_{k=1}^{C-1} (theta_{l+k} - theta_l); if the mean cosine similarity of the final hidden states
to those of the original model, over a few sequences, is above the threshold, the merge stays and the pointer moves
down by the interval, else by one.

Deviations. The number of layers is the goal here, in the paper the result: where the pointer comes to the lowest
layer before the target is reached, the threshold is lowered by 0.05 and the pointer starts at the deepest layers
again, and the last merge takes only as many layers as are left to remove. (Of two layers this rule keeps just the
second.) Norm weights and biases are merged like all others; the published notebook leaves the norms of the base.
Layers of different attention types are never merged. The few sequences are the first ones of the calibration set.

The notebook also subtracts the base as it has been changed by then, so that its sum telescopes to the last layer of the
merge: what was published as merging drops the others. This follows the formula, which needs layers whose weights are
alike; where they are not, as in the demo model, its sum is no layer (dev/LOG.md). `LacoSettings.reference` does what
the notebook does, all but the norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.architecture.spec import Architecture
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.candidates import normed_with
from intarsia.pruning.heal_in_loop import repair_forwards
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.settings import LacoSettings
from intarsia.pruning.step import Step, one_attention_type, strides
from intarsia.recipe.algebra import merge_of
from intarsia.recipe.ops import LayerRef, Op, Select

SEQUENCES = 10
"""Calibration sequences on which final hidden states are compared."""

_LOWER_BY = 0.05
_LEAST = -1.05  # every finite similarity is above it


class Laco:
    """Merging of differences, accepted by the similarity of final hidden states."""

    progressive = True
    measures = True

    def __init__(self, settings: LacoSettings) -> None:
        self.settings = settings
        self._reference: Tensor | None = None

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Move the pointer down until a merge is similar enough."""
        threshold = history[-1]["threshold"] if history else self.settings.threshold
        pointer = history[-1]["next"] if history else self._top(model.depth)
        similarities: dict[int, float] = {}
        restarted = False
        while True:
            while pointer >= self.settings.lowest:
                count = min(self.settings.merge, model.depth - target + 1, model.depth - pointer)
                if count > 1 and one_attention_type(model, model.ops[pointer : pointer + count]):
                    if pointer not in similarities:
                        similarities[pointer] = self._similarity(model, pointer, count)
                    if similarities[pointer] > threshold:
                        return self._step(model, pointer, count, threshold, similarities)
                pointer -= 1
            if restarted and (not similarities or threshold <= _LEAST):
                return None
            threshold = max(round(threshold - _LOWER_BY, 10), _LEAST)
            pointer, restarted = self._top(model.depth), True

    def reason(self) -> str:
        """Why nothing more can be merged."""
        return (
            f"no {self.settings.merge} adjacent layers of one attention type are left in the range of layers "
            "that may be merged"
        )

    def forwards_at_most(
        self, architecture: Architecture, target: int, sequences: int, in_loop: ClosedFormSettings | None
    ) -> int:
        """Every merge may be tried on the first sequences, as the original once is; then the model is measured."""
        depth = architecture.n_layers
        share = min(1.0, SEQUENCES / sequences)
        return (
            depth
            + math.ceil(share * depth)
            + sum(
                math.ceil(share * current * current) + current + repair_forwards(architecture, in_loop, current)
                for current, _ in strides(depth, target, self.settings.merge)
            )
        )

    def _top(self, depth: int) -> int:
        """Where the pointer starts: the deepest layer with C - 1 others behind it."""
        highest = depth if self.settings.highest is None else min(self.settings.highest, depth)
        return max(highest - self.settings.merge, min(self.settings.lowest, depth - 2))

    def _step(
        self, model: Intermediate, start: int, count: int, threshold: float, similarities: Mapping[int, float]
    ) -> Step:
        behind = min(start - self.settings.interval, model.depth - count + 1 - self.settings.merge)
        evidence = {
            "similarity": similarities[start],
            "threshold": threshold,
            "next": behind,
            "tried": {str(index): value for index, value in similarities.items()},
        }
        return Step(start=start, count=count, op=self._merged(model.ops[start : start + count]), evidence=evidence)

    def _merged(self, ops: Sequence[Op]) -> Op:
        return ops[-1] if self.settings.reference else collapsed(ops)

    def _similarity(self, model: Intermediate, start: int, count: int) -> float:
        """Mean cosine similarity, sequence by sequence, of final hidden states to the original model's."""
        few = slice(0, SEQUENCES)
        if self._reference is None:
            variant = model.ops[0].sources[0].variant
            whole = [
                Select(source=LayerRef(variant=variant, layer=layer)) for layer in range(model.architecture.n_layers)
            ]
            self._reference = normed_with(model, 0, model.depth, whole, sequences=few).flatten(1).float()
        merged = normed_with(model, start, count, [self._merged(model.ops[start : start + count])], sequences=few)
        found_N = torch.nn.functional.cosine_similarity(merged.flatten(1).float(), self._reference, dim=1)
        return float(found_N.double().mean())


def collapsed(ops: Sequence[Op]) -> Op:
    """theta_0 + sum_k (theta_k - theta_0), as one op."""
    return merge_of(ops, [2.0 - len(ops), *([1.0] * (len(ops) - 1))])
