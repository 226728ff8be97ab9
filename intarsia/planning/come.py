"""CoMe and CoMe-P: merge adjacent layers by concatenating their most sensitive pieces.

Source: Wang et al., Layer as Puzzle Pieces (NeurIPS 2025), arXiv 2510.15304.

Deviations from the publication, each undone by `ComeSettings.reference`: norms are folded into the rows that read
them, so that every piece sees the input it was trained on (published: averaged); the last layer's influence is
measured on the residual stream (published: behind the final norm); the distance of a span covers all its layers
(published: one); the grid of CoMe-P is raced (published: exhausted). Not undone: under grouped-query attention a
piece is a whole KV group, so that query heads keep the key/value head they were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.anatomy.spec import PARTS, Part
from intarsia.planning import allocate
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.planner import Step, one_attention_type
from intarsia.planning.scores import channel_sensitivity, piece_scores
from intarsia.planning.settings import ComeSettings
from intarsia.recipe.compose import concat_of, merge_of
from intarsia.recipe.ops import Op, Select

Counts = tuple[tuple[int, int], ...]
"""KV groups and channels that each merged layer gives."""

_RACE_STAGES = (0.0625, 0.125, 0.25, 0.5, 1.0)
_RACE_ERRORS = 2.0
_RACE_LEAST = 8
_RACE_LAST = 2


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
        distances = self._span_scores(model, allowed, count)
        start = min(distances, key=lambda index: (distances[index], index))
        influences = [measure.influence for measure in model.measures]
        shares = self._shares(model, start, influences[start : start + count])
        evidence: dict[str, Any] = {
            "influence": influences,
            "span_choice": self.settings.span_choice,
            "span_scores": {str(index): value for index, value in distances.items()},
            "prior_ratios": shares,
        }
        scores = [self._piece_scores(model, index) for index in range(start, start + count)]
        if self.posterior:
            chosen, shares, grid = self._best_counts(model, start, scores)
            evidence["grid"] = grid
        else:
            chosen = self._counts(model, shares)
        evidence["counts"] = {"kv_groups": [c[0] for c in chosen], "channels": [c[1] for c in chosen]}
        return Step(start=start, count=count, op=self._op(model, start, scores, chosen, shares), evidence=evidence)

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

    def _span_scores(self, model: Intermediate, allowed: Sequence[int], count: int) -> dict[int, float]:
        if self.settings.span_choice == "sleb":
            with model.progress.task("skipping spans", len(allowed)) as task:
                scores: dict[int, float] = {}
                for start in allowed:
                    sums_N = model.losses_with(start, count, [])
                    scores[start] = float(sums_N.sum() / model.counts_N.sum())
                    task.advance()
                return scores
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

    def _best_counts(
        self, model: Intermediate, start: int, scores: Sequence[Mapping[Part, Tensor]]
    ) -> tuple[Counts, list[float], list[dict[str, Any]]]:
        """CoMe-P: the counts (and the shares behind them) with the least calibration loss among all ratios of the grid.

        With racing, all candidates see an ever larger part of the calibration set. After each part the worse half
        leaves, and so does a candidate whose paired differences to the best, sequence by sequence, have a mean of
        more than two standard errors above zero.
        """
        count = len(scores)
        ratios: dict[Counts, list[float]] = {}
        for shares in allocate.share_grid(count, self.settings.granularity):
            ratios.setdefault(self._counts(model, shares), shares)
        ops = {counts: self._op(model, start, scores, counts, shares) for counts, shares in ratios.items()}
        found: dict[Counts, list[Tensor]] = {counts: [] for counts in ratios}
        alive = list(ratios)
        stages = self._stages(model)
        sizes = [part.stop - part.start for part in stages]
        with model.progress.task(f"trying {len(alive)} ratios", _race_length(len(alive), sizes)) as task:
            for part, size in zip(stages, sizes, strict=True):
                for counts in alive:
                    found[counts].append(model.losses_with(start, count, [ops[counts]], sequences=part))
                    task.advance(size)
                number_N = model.counts_N[: part.stop]
                # A sequence that is nearly all padding predicts nothing, and has no mean.
                means = {counts: (torch.cat(found[counts]) / number_N)[number_N > 0] for counts in alive}
                alive = _survivors(alive, means) if part.stop < model.counts_N.numel() else alive
                if len(alive) == 1:
                    break
                task.note(f"{len(alive)} left")
        totals = {counts: float(torch.cat(found[counts]).sum()) for counts in alive}
        best = min(alive, key=lambda counts: (totals[counts], alive.index(counts)))
        return best, ratios[best], [self._judged(model, ratios[counts], found[counts]) for counts in ratios]

    def _judged(self, model: Intermediate, shares: Sequence[float], losses: Sequence[Tensor]) -> dict[str, Any]:
        sums_N = torch.cat(list(losses))
        return {
            "ratios": list(shares),
            "sequences": sums_N.numel(),
            "loss": float(sums_N.sum() / model.counts_N[: sums_N.numel()].sum()),
        }

    def _stages(self, model: Intermediate) -> list[slice]:
        total = model.counts_N.numel()
        stops = (
            sorted({max(1, math.ceil(total * stage)) for stage in _RACE_STAGES}) if self.settings.racing else [total]
        )
        stops = [stop for stop in stops if stop >= min(_RACE_LEAST, total)]
        return [slice(first, stop) for first, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _survivors(alive: Sequence[Counts], means: Mapping[Counts, Tensor]) -> list[Counts]:
    """The better half of the candidates, less those that are clearly worse than the best, in the order of `alive`.

    `means` are losses a token, by sequence. At least two are compared until the end, unless one is clearly best.
    """
    if means[alive[0]].numel() < 2:
        return list(alive)
    ranked = sorted(alive, key=lambda counts: float(means[counts].mean()))
    half = ranked[: max(_RACE_LAST, math.ceil(len(ranked) / 2))]
    return [counts for counts in alive if counts in half and not _clearly_worse(means[counts] - means[ranked[0]])]


def _race_length(candidates: int, sizes: Sequence[int]) -> int:
    """Sequences that a race runs at most, for the time left."""
    length = 0
    for size in sizes:
        length += candidates * size
        candidates = max(min(_RACE_LAST, candidates), math.ceil(candidates / 2))
    return length


def _clearly_worse(gap_N: Tensor) -> bool:
    error = float(gap_N.std()) / math.sqrt(gap_N.numel())
    return float(gap_N.mean()) > _RACE_ERRORS * error
