"""Settings of the planners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from intarsia.errors import Problem, UserError
from intarsia.recipe.ops import NormMode

SpanChoice: TypeAlias = Literal["sbi", "sleb"]


@dataclass(frozen=True, kw_only=True)
class ComeSettings:
    """How CoMe and CoMe-P decide (arXiv 2510.15304).

    Attributes:
        span_choice: which adjacent layers to merge: `sbi`, the least span block influence; `sleb`, the least
            calibration loss when they are skipped.
        merge: how many adjacent layers become one in a step (m, 2 or more).
        sharpness: ratios are proportional to block influence to this power.
        dominance: if given, the largest share is at least dominance^(1/(n-1)), n original layers in the merge.
        no_repeat: a layer that is already merged is not merged again.
        norm: `fold` is exact; `average` is as published.
        sensitivity: size of an activation: `mean-abs` as published, or `l2`.
        distance: span influence over `all-tokens`, or the `last-token` of each sequence (arXiv 2403.17887).
        granularity: steps of the ratio grid of CoMe-P.
        spans: CoMe-P tries the ratios of so many spans, those of least influence; 1 as published.
        racing: CoMe-P drops a ratio as soon as it is clearly worse than the best on part of the calibration set.
        removals: CoMe-P also tries to drop each layer (each `merge` - 1 adjacent ones), wherever it is.
        finalists: where what a step changes is repaired before the next, CoMe-P repairs its so many best candidates,
            each of which removes something else, and takes the one of least loss on held-out sequences; 1 takes the
            best before any repair.
        blocks: beside those, so many blocks of adjacent layers of the original are left out of it, repaired and judged
            alike: the path so far is given up where one of them is better.
        combine: `concat`, the merged layer keeps pieces of each; two ablations of the paper: `weight-sum`, it is the
            sum of whole layers, weighted by share; `fuse`, the pieces that are left out are added, scaled, onto the
            most similar ones that are kept.
        reference: the published behaviour where ours differs by default: averaged norms, one span, no removals, no
            racing, one finalist, no blocks, the last layer's influence measured behind the final norm, and a distance
            over one layer whatever m is. Query heads are grouped correctly all the same.
    """

    span_choice: SpanChoice = "sbi"
    merge: int = 2
    sharpness: float = 1.0
    dominance: float | None = None
    no_repeat: bool = False
    norm: NormMode = "fold"
    sensitivity: Literal["mean-abs", "l2"] = "mean-abs"
    distance: Literal["all-tokens", "last-token"] = "all-tokens"
    granularity: int = 10
    spans: int = 3
    removals: bool = False
    racing: bool = True
    finalists: int = 1
    blocks: int = 0
    combine: Literal["concat", "weight-sum", "fuse"] = "concat"
    reference: bool = False

    def __post_init__(self) -> None:
        problems = [
            Problem(where=name, expected=expected, found=repr(found), remedy=f"Give --{name.replace('_', '-')} such.")
            for name, expected, found, right in (
                (
                    "span_choice",
                    f"one of {', '.join(get_args(SpanChoice))}",
                    self.span_choice,
                    self.span_choice in get_args(SpanChoice),
                ),
                ("merge", "a whole number, 2 or more", self.merge, self.merge >= 2),
                ("sharpness", "a number, 0 or more", self.sharpness, 0.0 <= self.sharpness < float("inf")),
                (
                    "dominance",
                    "a number above 0 and at most 1",
                    self.dominance,
                    self.dominance is None or 0.0 < self.dominance <= 1.0,
                ),
                ("granularity", "a whole number, 1 or more", self.granularity, self.granularity >= 1),
                ("spans", "a whole number, 1 or more", self.spans, self.spans >= 1),
                ("finalists", "a whole number, 1 or more", self.finalists, self.finalists >= 1),
                ("blocks", "a whole number, 0 or more", self.blocks, self.blocks >= 0),
            )
            if not right
        ]
        if problems:
            raise UserError(problems)

    def effective(self) -> ComeSettings:
        """The settings with what `reference` implies."""
        if not self.reference:
            return self
        return replace(self, norm="average", spans=1, removals=False, racing=False, finalists=1, blocks=0)


THOROUGH: Mapping[str, Any] = {"spans": 5, "granularity": 5, "removals": True, "finalists": 4, "blocks": 5}
"""What goes with `--thorough`, beside the repair of every step: CoMe-P where the repaired model is all that counts."""


@dataclass(frozen=True, kw_only=True)
class SlebSettings:
    """How SLEB decides (arXiv 2402.09025).

    Attributes:
        racing: give a layer up as soon as leaving it out is clearly worse on part of the calibration set.
    """

    racing: bool = True


@dataclass(frozen=True, kw_only=True)
class LacoSettings:
    """How LaCo decides (arXiv 2402.11187).

    Attributes:
        merge: how many adjacent layers become one (C). The default is the paper's for a model of 7 billion parameters.
        threshold: the least similarity to the original model at which a merge is accepted, at first.
        interval: by how many layers the pointer goes on after a merge (I).
        lowest: the first layer, from 0, that others may collapse into (L).
        highest: layers behind the first so many are not merged at first (H); None: the whole depth.
        reference: what the published notebook computes instead of the formula: its sum is the last layer of a merge.
    """

    merge: int = 4
    threshold: float = 0.65
    interval: int = 2
    lowest: int = 1
    highest: int | None = None
    reference: bool = False

    def __post_init__(self) -> None:
        problems = [
            Problem(where=name, expected=expected, found=repr(found), remedy=f"Give --laco-{name} such.")
            for name, expected, found, right in (
                ("merge", "a whole number, 2 or more", self.merge, self.merge >= 2),
                ("threshold", "a number between -1 and 1", self.threshold, -1.0 <= self.threshold <= 1.0),
                ("interval", "a whole number, 1 or more", self.interval, self.interval >= 1),
                ("lowest", "a whole number, 0 or more", self.lowest, self.lowest >= 0),
                (
                    "highest",
                    "a whole number above lowest",
                    self.highest,
                    self.highest is None or self.highest > self.lowest,
                ),
            )
            if not right
        ]
        if problems:
            raise UserError(problems)


Settings: TypeAlias = ComeSettings | SlebSettings | LacoSettings
"""What a method can be set to."""


def layers_at_once(settings: Settings | None) -> int:
    """How many adjacent layers a step makes one, at most."""
    return settings.merge if isinstance(settings, ComeSettings | LacoSettings) else 2
