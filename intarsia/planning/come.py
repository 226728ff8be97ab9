"""CoMe and CoMe-P: merge adjacent layers by concatenating their most sensitive pieces.

Source: Wang et al., Layer as Puzzle Pieces (NeurIPS 2025), arXiv 2510.15304.

Deviations from the publication, each undone by `ComeSettings.reference`: norms are folded into the rows that read
them, so that every piece sees the input it was trained on (published: averaged); the last layer's influence is
measured on the residual stream (published: behind the final norm); the distance of a span covers all its layers
(published: one); CoMe-P tries the ratios of several spans (published: of one), and races them (published: all of them
see the whole calibration set). Not undone: under grouped-query attention a piece is a whole KV group, so that query
heads keep the key/value head they were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor

from intarsia.anatomy.spec import PARTS, Part
from intarsia.planning import allocate
from intarsia.planning.candidates import losses_with
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.planner import Step, one_attention_type
from intarsia.planning.race import mean_loss, race
from intarsia.planning.repair import reconstruction_error
from intarsia.planning.scores import channel_sensitivity, piece_scores
from intarsia.planning.sensitivity import sensitivity_map
from intarsia.planning.settings import ComeSettings
from intarsia.recipe.compose import concat_of, merge_of
from intarsia.recipe.ops import Op, Select

Counts = tuple[tuple[int, int], ...]
"""KV groups and channels that each merged layer gives."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer that could take the place of those from `start` on."""

    start: int
    counts: Counts
    shares: Sequence[float]
    op: Op


class Come:
    """The prior form: ratios come from block influence. With `posterior`, CoMe-P: from the calibration loss."""

    progressive = True
    measures = True

    def __init__(self, settings: ComeSettings, *, posterior: bool) -> None:
        self.settings = settings.effective()
        self.posterior = posterior

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Choose a span, its ratios, and the pieces to keep."""
        count = min(self.settings.merge, model.depth - target + 1)
        allowed = [start for start in range(model.depth - count + 1) if self._allowed(model, start, count)]
        if not allowed:
            return None
        influences = [measure.influence for measure in model.measures]
        # Of every layer once, and only of those that are looked at.
        pieces = cache(partial(self._piece_scores, model))

        def scores(start: int) -> list[Mapping[Part, Tensor]]:
            return [pieces(index) for index in range(start, start + count)]

        def prior(start: int) -> Candidate:
            shares = self._shares(model, start, influences[start : start + count])
            counts = self._counts(model, shares)
            op = self._op(model, start, scores(start), counts, shares)
            return Candidate(start=start, counts=counts, shares=shares, op=op)

        distances = self._span_scores(model, allowed, count, prior)
        ranked = sorted(allowed, key=lambda start: (distances[start], start))
        grid: list[dict[str, Any]] | None = None
        if self.posterior:
            chosen, grid = self._raced(model, {start: scores(start) for start in ranked[: self.settings.spans]})
        else:
            chosen = prior(ranked[0])
        evidence = {
            "influence": influences,
            "span_choice": self.settings.span_choice,
            "span_scores": {str(index): value for index, value in distances.items()},
            "prior_ratios": self._shares(model, chosen.start, influences[chosen.start : chosen.start + count]),
            **({} if grid is None else {"grid": grid}),
            # Of the whole model, for people to look at.
            **({} if history else {"sensitivity": sensitivity_map(map(pieces, range(model.depth)))}),
            "counts": {"kv_groups": [c[0] for c in chosen.counts], "channels": [c[1] for c in chosen.counts]},
        }
        return Step(start=chosen.start, count=count, op=chosen.op, evidence=evidence)

    def reason(self) -> str:
        """Why nothing more can be merged."""
        return (
            f"with no-repeat, no {self.settings.merge} adjacent layers are left of which none is merged already"
            if self.settings.no_repeat
            else "layers of different attention types are not merged, and no others are adjacent"
        )

    def _allowed(self, model: Intermediate, start: int, count: int) -> bool:
        ops = model.ops[start : start + count]
        if self.settings.no_repeat and not all(isinstance(op, Select) for op in ops):
            return False
        return one_attention_type(model, ops)

    def _span_scores(
        self, model: Intermediate, allowed: Sequence[int], count: int, prior: Callable[[int], Candidate]
    ) -> dict[int, float]:
        if self.settings.span_choice == "sleb":
            with model.progress.task("skipping spans", len(allowed)) as task:
                scores: dict[int, float] = {}
                for start in allowed:
                    sums_N = losses_with(model, start, count, [])
                    scores[start] = float(sums_N.sum() / model.counts_N.sum())
                    task.advance()
                return scores
        if self.settings.span_choice == "reconstruction":
            errors: dict[int, float] = {}
            with model.progress.task("fitting spans", len(allowed)) as task:
                for start in allowed:
                    errors[start] = reconstruction_error(model, start, count, prior(start).op)
                    task.advance()
            return errors
        length = 1 if self.settings.reference else count
        return {start: model.span_distance(start, length, self.settings.distance) for start in allowed}

    def _shares(self, model: Intermediate, start: int, influences: Sequence[float]) -> list[float]:
        shares = allocate.ratios(influences, self.settings.sharpness)
        if self.settings.dominance is None:
            return shares
        ops = model.ops[start : start + len(influences)]
        originals = len({source for op in ops for source in op.sources})
        return allocate.dominate(shares, self.settings.dominance ** (1.0 / (originals - 1)))

    def _counts(self, model: Intermediate, shares: Sequence[float]) -> Counts:
        groups = allocate.counts(shares, model.anatomy.n_kv_heads)
        channels = allocate.counts(shares, model.anatomy.n_channels)
        return tuple(zip(groups, channels, strict=True))

    def _piece_scores(self, model: Intermediate, index: int) -> dict[Part, Tensor]:
        scores: dict[Part, Tensor] = {}
        for part in PARTS:
            sums = model.measures[index].channels[part]
            activation = sums.mean_absolute_C if self.settings.sensitivity == "mean-abs" else sums.root_mean_square_C
            weight = model.modules[index].get_submodule(model.anatomy.writer(part).module).weight
            assert isinstance(weight, Tensor)
            scores[part] = piece_scores(channel_sensitivity(activation, weight), model.anatomy, part)
        return scores

    def _op(
        self,
        model: Intermediate,
        start: int,
        scores: Sequence[Mapping[Part, Tensor]],
        chosen: Counts,
        shares: Sequence[float],
    ) -> Op:
        """The layer that keeps each merged layer's most sensitive pieces; with `weight-sum`, their sum by share."""
        if self.settings.combine == "weight-sum":
            return merge_of(model.ops[start : start + len(shares)], shares)
        totals = {"attention": model.anatomy.n_kv_heads, "mlp": model.anatomy.n_channels}
        number = [dict(zip(PARTS, count, strict=True)) for count in chosen]
        return concat_of(
            model.ops[start : start + len(chosen)],
            [{part: allocate.top(scores[i][part], number[i][part]) for part in PARTS} for i in range(len(chosen))],
            weights=[{part: number[i][part] / totals[part] for part in PARTS} for i in range(len(chosen))],
            norm=self.settings.norm,
            anatomy=model.anatomy,
            fuse=self.settings.combine == "fuse",
        )

    def _raced(
        self,
        model: Intermediate,
        scores: Mapping[int, Sequence[Mapping[Part, Tensor]]],
    ) -> tuple[Candidate, list[dict[str, Any]]]:
        """CoMe-P: the span and the ratio of the grid with the least calibration loss, and what every one has shown."""
        candidates: dict[tuple[Op, ...], Candidate] = {}
        for start in scores:
            count = len(scores[start])
            for shares in allocate.share_grid(count, self.settings.granularity):
                counts = self._counts(model, shares)
                op = self._op(model, start, scores[start], counts, shares)
                # Two ratios may round to the same counts, and two spans may drop the same layer.
                layers = (*model.ops[:start], op, *model.ops[start + count :])
                candidates.setdefault(layers, Candidate(start=start, counts=counts, shares=shares, op=op))
        tried = list(candidates.values())
        spans = f" of {len(scores)} spans" if len(scores) > 1 else ""
        best, sums = race(
            range(len(tried)),
            lambda i, part: losses_with(model, tried[i].start, len(tried[i].counts), [tried[i].op], sequences=part),
            model.counts_N,
            racing=self.settings.racing,
            progress=model.progress,
            title=f"trying {len(tried)} ratios{spans}",
        )
        grid = [
            {
                "start": candidate.start,
                "ratios": candidate.shares,
                "sequences": sums[index].numel(),
                "loss": mean_loss(sums[index], model.counts_N),
            }
            for index, candidate in enumerate(tried)
        ]
        return tried[best], grid
