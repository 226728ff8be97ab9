"""CoMe: merge adjacent layers into one with the most sensitive pieces of each, at ratios by block influence.

Source: Wang et al., Layer as Puzzle Pieces, arXiv 2510.15304. Deviations by default: norms are folded into the rows
that read them, which is exact; the last layer's influence is measured before the final norm; the distance of a span
covers all merged layers. `--preset paper` follows the publication, except that query heads are grouped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.healing.settings import Check
from intarsia.pruning import scores as allocate
from intarsia.pruning.step import Change, Progressive, ProgressiveSettings, Step, one_attention_type, strides
from intarsia.recipe.algebra import concat_of, merge_of
from intarsia.recipe.recipe import NormMode, Op, Select, sources_of
from intarsia.registry import planner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from intarsia.pruning.intermediate import Intermediate

Counts: TypeAlias = tuple[tuple[int, int], ...]
"""Number of KV groups and channels from each merged layer."""

Scores: TypeAlias = Mapping[Part, "Tensor"]
"""The scores of a layer's pieces, by part."""


@dataclass(frozen=True, kw_only=True)
class ComeSettings(ProgressiveSettings):
    """How CoMe decides."""

    # Merge the span of least influence (sbi), or the one that costs least loss to skip (sleb).
    span_choice: Literal["sbi", "sleb"] = "sbi"
    # Adjacent layers to merge in a step.
    merge: int = 2
    # Shares are proportional to block influence to this power.
    sharpness: float = 1.0
    # Least share of the strongest of n layers: this to the power 1/(n-1).
    dominance: float | None = None
    # Never merge a merged layer again.
    no_repeat: bool = False
    # Fold norms into the rows that read them, which is exact; or average them, as published.
    norm: NormMode = "fold"
    # Activation norm in the channel scores.
    sensitivity: Literal["mean-abs", "l2"] = "mean-abs"
    # Tokens that count in the span influence.
    distance: Literal["all-tokens", "last-token"] = "all-tokens"
    # Join pieces of the layers; or, as ablations, sum whole layers by share, or add each discarded piece to the most
    # similar kept one.
    combine: Literal["concat", "weight-sum", "fuse"] = "concat"
    # Measure the last layer's influence after the final norm, as published.
    after_final_norm: bool = False
    # Take the span influence over one layer, whatever --merge says, as published.
    one_layer_distance: bool = False

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"norm": "average", "after_final_norm": True, "one_layer_distance": True}
    }

    def checks(self) -> Iterator[Check]:
        yield from super().checks()
        yield from self.at_least(2, "merge")
        yield 0.0 <= self.sharpness < float("inf"), ("sharpness",), "a number, 0 or more"
        yield self.dominance is None or 0.0 < self.dominance <= 1.0, ("dominance",), "a number above 0, at most 1"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A replacement of the `count` layers from `start` on: one joined layer, or none."""

    start: int
    count: int
    op: Op | None
    # Shares of each layer's attention, and of its MLP.
    shares: Sequence[float] = ()
    mlp_shares: Sequence[float] = ()
    counts: Counts = ()


@planner("come", settings=ComeSettings, paper="2510.15304")
class Come(Progressive):
    """Concatenate adjacent layers, at ratios by block influence."""

    settings: ComeSettings
    joins = True

    def __init__(self, settings: ComeSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.after_final_norm = settings.after_final_norm
        self.layers_at_once = settings.merge

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Choose a span, its ratios, and the pieces to keep."""
        count = min(self.settings.merge, model.depth - target + 1)
        allowed = [start for start in range(model.depth - count + 1) if self._allowed(model, start, count)]
        # Scored once for each layer, when it is first needed.
        pieces = cache(partial(self._piece_scores, model))
        distances = self._span_scores(model, allowed, count)
        ranked = sorted(allowed, key=lambda start: (distances[start], start))
        chosen, shown = self.choose(model, ranked, count, pieces)
        if chosen is None:
            return None
        influences = [measure.influence for measure in model.measures]
        evidence = {
            "influence": influences,
            "span_choice": self.settings.span_choice,
            "span_scores": {str(index): value for index, value in distances.items()},
            **shown,
            # For the report: the whole model's scores.
            **(
                {}
                if history or model.architecture.removal_only
                else {"sensitivity": allocate.sensitivity_map(map(pieces, range(model.depth)))}
            ),
        }
        evidence |= self._about(model, chosen)
        return Step(start=chosen.start, count=chosen.count, op=chosen.op, evidence=evidence)

    def choose(
        self, model: Intermediate, ranked: Sequence[int], count: int, pieces: Callable[[int], Scores]
    ) -> tuple[Candidate | None, dict[str, Any]]:
        """The best candidate (None if there is none), and evidence for the log.

        Args:
            ranked: starts of spans of `count` layers that may be merged, best first.
            pieces: the scores of a layer's pieces.
        """
        if not ranked:
            return None, {}
        start = ranked[0]
        scores = [pieces(index) for index in range(start, start + count)]
        return self.candidate(model, start, scores, self._shares(model, start, count)), {}

    def candidate(
        self,
        model: Intermediate,
        start: int,
        scores: Sequence[Scores],
        shares: Sequence[float],
        mlp_shares: Sequence[float] | None = None,
    ) -> Candidate:
        """The layer that keeps each merged layer's most sensitive pieces; with `weight-sum`, their sum by share.

        Args:
            shares: of each layer; of its attention, if `mlp_shares` is given.
        """
        mlp_shares = shares if mlp_shares is None else mlp_shares
        groups = allocate.counts(shares, model.architecture.n_kv_heads)
        channels = allocate.counts(mlp_shares, model.architecture.n_pieces("mlp"))
        counts = tuple(zip(groups, channels, strict=True))
        op = self._op(model, start, scores, counts, shares)
        return Candidate(start=start, count=len(shares), op=op, shares=shares, mlp_shares=mlp_shares, counts=counts)

    def reason(self) -> str:
        return (
            f"with no-repeat, no {self.settings.merge} adjacent unmerged layers are left"
            if self.settings.no_repeat
            else "layers of different attention types are not merged, and no others are adjacent"
        )

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> float:
        """Each tried span re-runs the layers after it; then the model is measured."""
        total = float(architecture.n_layers)
        for current, count in strides(architecture.n_layers, target, self.settings.merge):
            after = current - count + 1
            tried = after * (after - 1) // 2 if self.settings.span_choice == "sleb" else 0
            total += (
                tried + self.tried_forwards(after, count, sequences) + after + self.heal_forwards(architecture, current)
            )
        return total

    def tried_forwards(self, after: int, count: int, sequences: int) -> float:
        """Layer-forwards of trying candidates; `after` is the depth after the step."""
        return 0

    def _about(self, model: Intermediate, chosen: Candidate) -> dict[str, Any]:
        """The log entry of a step."""
        if chosen.op is None:
            return {"dropped": sources_of(model.ops[chosen.start : chosen.start + chosen.count])}
        groups, channels = zip(*chosen.counts, strict=True)
        return {
            "prior_ratios": self._shares(model, chosen.start, chosen.count),
            "counts": {"kv_groups": list(groups), "channels": list(channels)},
        }

    def _allowed(self, model: Intermediate, start: int, count: int) -> bool:
        ops = model.ops[start : start + count]
        if model.architecture.removal_only:
            return False
        if self.settings.no_repeat and not all(isinstance(op, Select) for op in ops):
            return False
        return one_attention_type(model, ops)

    def _span_scores(self, model: Intermediate, allowed: Sequence[int], count: int) -> dict[int, float]:
        if self.settings.span_choice == "sleb":  # the calibration loss without each span
            skips = model.losses_with(Change(start=start, count=count, ops=()) for start in allowed)
            return {
                start: float(sums_N.sum() / model.counts_N.sum()) for start, sums_N in zip(allowed, skips, strict=True)
            }
        length = 1 if self.settings.one_layer_distance else count
        return {start: model.span_distance(start, length, self.settings.distance) for start in allowed}

    def _shares(self, model: Intermediate, start: int, count: int) -> list[float]:
        influences = [measure.influence for measure in model.measures[start : start + count]]
        shares = allocate.ratios(influences, self.settings.sharpness)
        if self.settings.dominance is None:
            return shares
        originals = len({source for op in model.ops[start : start + count] for source in op.sources})
        return allocate.dominate(shares, self.settings.dominance ** (1.0 / (originals - 1)))

    def _piece_scores(self, model: Intermediate, index: int) -> Scores:
        channels, l2 = model.measures[index].channels, self.settings.sensitivity == "l2"
        with model.resident.awake(model.modules[index]) as module:
            return {
                part: allocate.part_scores(channels[part], module, model.architecture, part, l2=l2) for part in PARTS
            }

    def _op(
        self, model: Intermediate, start: int, scores: Sequence[Scores], chosen: Counts, shares: Sequence[float]
    ) -> Op:
        ops = model.ops[start : start + len(shares)]
        if self.settings.combine == "weight-sum":
            return merge_of(ops, shares)
        totals = {part: model.architecture.n_pieces(part) for part in PARTS}
        number = [dict(zip(PARTS, count, strict=True)) for count in chosen]
        return concat_of(
            ops,
            [{part: allocate.top(scores[i][part], number[i][part]) for part in PARTS} for i in range(len(chosen))],
            weights=[{part: number[i][part] / totals[part] for part in PARTS} for i in range(len(chosen))],
            norm=self.settings.norm,
            architecture=model.architecture,
            fuse=self.settings.combine == "fuse",
        )
