"""LaCo: collapse layers into an earlier one by adding their differences to it.

Source: Yang et al., LaCo, arXiv 2402.11187. A pointer l goes down from the deepest layers. There the C layers from l
on become theta_l + sum_{k=1}^{C-1} (theta_{l+k} - theta_l); if the mean cosine similarity of the final hidden states
to those of the original model, over a few sequences, is above the threshold, the merge stays and the pointer moves
down by the interval, else by one.

Deviations. The number of layers is given here, and a result in the paper: if the pointer reaches the lowest layer
before the target is reached, the threshold drops by 0.05 and the pointer starts at the deepest layers again; the last
merge takes only as many layers as are still to be removed. (Of two layers the sum is just the second.) Norm weights and
biases are merged like all others; the published notebook keeps the base's norms. Layers of different attention types
are never merged. The few sequences are the first of the calibration set.

The notebook also subtracts the already changed base, so that its sum telescopes to the last layer of the merge: its
merging drops the others. The default follows the paper's formula, which needs layers with similar weights; without
them, as in the demo model, the sum does not work as a layer (dev/LOG.md). `--preset paper` follows the notebook, except
for the norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from intarsia.architecture.spec import Architecture
from intarsia.flags import flag
from intarsia.healing.settings import Check
from intarsia.pruning.step import Change, Progressive, ProgressiveSettings, Step, one_attention_type, strides
from intarsia.recipe.algebra import merge_of
from intarsia.recipe.recipe import LayerRef, Op, Select
from intarsia.registry import planner

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.pruning.intermediate import Intermediate

SEQUENCES = 10
"""Calibration sequences on which final hidden states are compared."""

_LOWER_BY = 0.05
_LEAST = -1.05  # every finite similarity is above it


@dataclass(frozen=True, kw_only=True)
class LacoSettings(ProgressiveSettings):
    """How LaCo decides."""

    # Adjacent layers to merge in a step (C); the default is the paper's for 7 billion parameters.
    merge: int = flag(4, "--laco-merge")
    # Least similarity to the original model at which a merge is accepted, before it is lowered.
    threshold: float = flag(0.65, "--laco-threshold")
    # Layers by which the pointer moves down after a merge (I).
    interval: int = flag(2, "--laco-interval")
    # The first layer, from 0, that others may collapse into (L).
    lowest: int = flag(1, "--laco-lowest")
    # First merge only among the first N layers (H; default: all).
    highest: int | None = flag(None, "--laco-highest", metavar="N")
    # The formula of the paper, or of the published notebook, whose sum is the last layer of a merge.
    formula: Literal["paper", "notebook"] = flag("paper", "--laco-formula")

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"formula": "notebook"}}

    def checks(self) -> Iterator[Check]:
        yield from super().checks()
        yield from self.at_least(2, "merge")
        yield -1.0 <= self.threshold <= 1.0, ("threshold",), "a similarity between -1 and 1"
        yield from self.at_least(1, "interval")
        yield from self.at_least(0, "lowest")
        yield from self.at_least(self.lowest + 1, "highest")


@planner("laco", settings=LacoSettings, paper="2402.11187")
class Laco(Progressive):
    """Merge differences of layers, accepted by the similarity of final hidden states."""

    joins = True

    def __init__(self, settings: LacoSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.layers_at_once = settings.merge
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
        return (
            f"no {self.settings.merge} adjacent layers of one attention type are left in the range of layers "
            "that may be merged"
        )

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> int:
        """Every merge may be tried on the first sequences, and the original once; then the model is measured."""
        depth = architecture.n_layers
        share = min(1.0, SEQUENCES / sequences)
        return (
            depth
            + math.ceil(share * depth)
            + sum(
                math.ceil(share * current * current) + current + self.heal_forwards(architecture, current)
                for current, _ in strides(depth, target, self.settings.merge)
            )
        )

    def _top(self, depth: int) -> int:
        """Where the pointer starts: the deepest layer with C - 1 others after it."""
        highest = depth if self.settings.highest is None else min(self.settings.highest, depth)
        return max(highest - self.settings.merge, min(self.settings.lowest, depth - 2))

    def _step(
        self, model: Intermediate, start: int, count: int, threshold: float, similarities: Mapping[int, float]
    ) -> Step:
        below = min(start - self.settings.interval, model.depth - count + 1 - self.settings.merge)
        evidence = {
            "similarity": similarities[start],
            "threshold": threshold,
            "next": below,
            "tried": {str(index): value for index, value in similarities.items()},
        }
        return Step(start=start, count=count, op=self._merged(model.ops[start : start + count]), evidence=evidence)

    def _merged(self, ops: Sequence[Op]) -> Op:
        return ops[-1] if self.settings.formula == "notebook" else collapsed(ops)

    def _similarity(self, model: Intermediate, start: int, count: int) -> float:
        """Mean cosine similarity, sequence by sequence, of final hidden states to the original model's."""
        from torch.nn.functional import cosine_similarity

        if self._reference is None:
            variant = model.ops[0].sources[0].variant
            whole = [
                Select(source=LayerRef(variant=variant, layer=layer)) for layer in range(model.architecture.n_layers)
            ]
            self._reference = _normed_with(model, 0, model.depth, whole)
        merged = _normed_with(model, start, count, [self._merged(model.ops[start : start + count])])
        found_N = cosine_similarity(merged, self._reference, dim=1)
        return float(found_N.double().mean())


def collapsed(ops: Sequence[Op]) -> Op:
    """theta_0 + sum_k (theta_k - theta_0), as one op."""
    return merge_of(ops, [2.0 - len(ops), *([1.0] * (len(ops) - 1))])


def _normed_with(model: Intermediate, start: int, count: int, ops: Sequence[Op]) -> Tensor:
    """H^L of the first sequences after the final norm, with `ops` in place of `count` layers.

    Float32 `[sequences, tokens * width]` on the CPU; padding is zero.
    """
    import torch

    found: list[Tensor] = []

    def end(_: int, rows: slice, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
        normed = model.loop.stream.final_norm(h_BTD, ids, mask)
        found.append((normed if mask is None else normed.masked_fill(~mask[..., None], 0.0)).cpu())

    path = model.path(Change(start=start, count=count, ops=tuple(ops)))
    with torch.inference_mode():
        model.loop.run([path], end, sequences=slice(0, min(SEQUENCES, model.rows.stop)))
    return torch.cat(found).flatten(1).float()
