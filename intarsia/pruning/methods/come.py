"""What CoMe-P chooses from: ratios of spans, and removals of whole layers, raced by calibration loss.

A ratio that leaves layers out altogether is a removal too, but where layers are repaired on the way the two differ: a
removal leaves the layers that stay with what was fitted on them, a merge makes a layer anew. So where both give the
same layers, the removal is what is tried.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning import scores as allocate
from intarsia.pruning.candidates import Change, losses_of
from intarsia.pruning.heal_in_loop import repair_forwards
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.race import best_of_groups, mean_loss, race
from intarsia.pruning.scores import part_scores, sensitivity_map
from intarsia.pruning.settings import ComeSettings
from intarsia.pruning.step import Step, one_attention_type, strides
from intarsia.recipe.algebra import concat_of, merge_of
from intarsia.recipe.ops import Op, Select, sources_of

Counts: TypeAlias = tuple[tuple[int, int], ...]
"""KV groups and channels that each merged layer gives."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What could take the place of `count` layers from `start` on: a layer joined from them, or none."""

    start: int
    count: int
    op: Op | None
    shares: Sequence[float] = ()
    counts: Counts = ()

    @property
    def goes(self) -> Hashable:
        """Which layers it removes: all but the one that gives most; and whether it removes them whole."""
        span = range(self.start, self.start + self.count)
        if self.op is None:
            return tuple(span), True
        largest = max(range(self.count), key=lambda index: self.shares[index])
        return tuple(index for index in span if index != self.start + largest), False


@dataclass(frozen=True, kw_only=True)
class Raced:
    """Candidates that are left, the best first, and what every candidate has shown, for the log."""

    best: list[Candidate]
    shown: list[dict[str, Any]]


def removals(model: Intermediate, count: int) -> Iterable[Candidate]:
    """Every removal of so many adjacent layers."""
    for start in range(model.depth - count + 1):
        yield Candidate(start=start, count=count, op=None)


def distinct(model: Intermediate, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of those that lead to the same layers the first: two ratios may round to the same counts, and two spans may drop
    the same layer."""
    found: dict[tuple[Op, ...], Candidate] = {}
    for each in candidates:
        put_in = () if each.op is None else (each.op,)
        layers = (*model.ops[: each.start], *put_in, *model.ops[each.start + each.count :])
        found.setdefault(layers, each)
    return list(found.values())


def raced(model: Intermediate, tried: Sequence[Candidate], number: int, *, racing: bool, title: str) -> Raced:
    """The `number` candidates of least calibration loss, each of which removes something else."""
    changes = [Change(start=each.start, count=each.count, ops=() if each.op is None else (each.op,)) for each in tried]

    def group(index: int) -> Hashable:
        return tried[index].goes

    best, sums = race(
        range(len(tried)),
        lambda some, part: losses_of(model, [changes[index] for index in some], sequences=part),
        model.counts_N,
        racing=racing,
        keep=number,
        group=group,
        progress=model.progress,
        title=title,
    )
    losses = {index: mean_loss(found, model.counts_N) for index, found in sums.items()}
    shown = [
        {
            "start": each.start,
            **({"dropped": each.count} if each.op is None else {}),
            "ratios": list(each.shares),
            "sequences": sums[index].numel(),
            "loss": losses[index],
        }
        for index, each in enumerate(tried)
    ]
    if number == 1:
        return Raced(best=[tried[best]], shown=shown)
    return Raced(best=[tried[index] for index in best_of_groups(sums, number, group)], shown=shown)


class Come:
    """The prior form: ratios come from block influence. With `posterior`, CoMe-P: from the calibration loss."""

    progressive = True
    measures = True

    def __init__(self, settings: ComeSettings, *, posterior: bool) -> None:
        self.settings = settings.effective()
        self.posterior = posterior

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Choose a span, its ratios, and the pieces to keep."""
        steps = self.steps(model, target, history, 1)
        return steps[0] if steps else None

    def steps(
        self,
        model: Intermediate,
        target: int,
        history: Sequence[Mapping[str, Any]],
        number: int,
    ) -> list[Step]:
        """The `number` best steps, each of which removes something else, the best first: none where none is allowed.

        CoMe knows one.
        """
        count = min(self.settings.merge, model.depth - target + 1)
        allowed = [start for start in range(model.depth - count + 1) if self._allowed(model, start, count)]
        drops = self.posterior and self.settings.removals
        if not allowed and not drops:
            return []
        influences = [measure.influence for measure in model.measures]
        # Of every layer once, and only of those that are looked at.
        pieces = cache(partial(self._piece_scores, model))

        def scores(start: int) -> list[Mapping[Part, Tensor]]:
            return [pieces(index) for index in range(start, start + count)]

        distances = self._span_scores(model, allowed, count)
        ranked = sorted(allowed, key=lambda start: (distances[start], start))
        grid: list[dict[str, Any]] | None = None
        if self.posterior:
            spans = {start: scores(start) for start in ranked[: self.settings.spans]}
            tried = distinct(model, [*(removals(model, count - 1) if drops else ()), *self._merges(model, spans)])
            title = f"trying {len(tried)} ratios" + (f" of {len(spans)} spans" if len(spans) > 1 else "")
            found = raced(
                model,
                tried,
                number,
                racing=self.settings.racing,
                title=title + (" and removals" if drops else ""),
            )
            chosen, grid = found.best, found.shown
        else:
            first = ranked[0]
            shares = self._shares(model, first, influences[first : first + count])
            counts = self._counts(model, shares)
            op = self._op(model, first, scores(first), counts, shares)
            chosen = [Candidate(start=first, count=count, counts=counts, shares=shares, op=op)]
        whole = {
            "influence": influences,
            "span_choice": self.settings.span_choice,
            "span_scores": {str(index): value for index, value in distances.items()},
            **({} if grid is None else {"grid": grid}),
            # Of the whole model, for people to look at.
            **({} if history else {"sensitivity": sensitivity_map(map(pieces, range(model.depth)))}),
        }
        return [
            Step(
                start=each.start,
                count=each.count,
                op=each.op,
                evidence={**whole, **self._about(model, each, influences)},
            )
            for each in chosen
        ]

    def reason(self) -> str:
        """Why nothing more can be merged."""
        return (
            f"with no-repeat, no {self.settings.merge} adjacent layers are left of which none is merged already"
            if self.settings.no_repeat
            else "layers of different attention types are not merged, and no others are adjacent"
        )

    def forwards_at_most(
        self, architecture: Architecture, target: int, sequences: int, in_loop: ClosedFormSettings | None
    ) -> int:
        """Each span, ratio and removal that is tried re-runs what is after it; then the model is measured."""
        given, total = self.settings, architecture.n_layers
        finalists, blocks = (given.finalists, given.blocks) if self.posterior else (1, 0)
        for current, count in strides(architecture.n_layers, target, given.merge):
            after = current - count + 1
            tried = after * (after - 1) // 2 if given.span_choice == "sleb" else 0
            if self.posterior:
                ratios = math.comb(given.granularity + count - 1, count - 1)
                tried += min(given.spans, after) * ratios * after
                tried += after * (after + 1) // 2 if given.removals else 0
            total += tried + after + repair_forwards(architecture, in_loop, current, finalists=finalists, blocks=blocks)
        return total

    def _about(self, model: Intermediate, chosen: Candidate, influences: Sequence[float]) -> dict[str, Any]:
        """What is logged of a step itself."""
        stop = chosen.start + chosen.count
        if chosen.op is None:
            return {"dropped": sources_of(model.ops[chosen.start : stop])}
        groups, channels = zip(*chosen.counts, strict=True)
        return {
            "prior_ratios": self._shares(model, chosen.start, influences[chosen.start : stop]),
            "counts": {"kv_groups": list(groups), "channels": list(channels)},
        }

    def _allowed(self, model: Intermediate, start: int, count: int) -> bool:
        ops = model.ops[start : start + count]
        if self.settings.no_repeat and not all(isinstance(op, Select) for op in ops):
            return False
        return one_attention_type(model, ops)

    def _span_scores(self, model: Intermediate, allowed: Sequence[int], count: int) -> dict[int, float]:
        if self.settings.span_choice == "sleb":
            with model.progress.task("skipping spans", len(allowed)) as task:
                scores: dict[int, float] = {}
                skips = [Change(start=start, count=count, ops=()) for start in allowed]
                for start, sums_N in zip(allowed, losses_of(model, skips), strict=True):
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
        groups = allocate.counts(shares, model.architecture.n_kv_heads)
        channels = allocate.counts(shares, model.architecture.n_pieces("mlp"))
        return tuple(zip(groups, channels, strict=True))

    def _piece_scores(self, model: Intermediate, index: int) -> dict[Part, Tensor]:
        channels, l2 = model.measures[index].channels, self.settings.sensitivity == "l2"
        with model.resident.awake(model.modules[index]) as module:
            return {part: part_scores(channels[part], module, model.architecture, part, l2=l2) for part in PARTS}

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
        totals = {part: model.architecture.n_pieces(part) for part in PARTS}
        number = [dict(zip(PARTS, count, strict=True)) for count in chosen]
        return concat_of(
            model.ops[start : start + len(chosen)],
            [{part: allocate.top(scores[i][part], number[i][part]) for part in PARTS} for i in range(len(chosen))],
            weights=[{part: number[i][part] / totals[part] for part in PARTS} for i in range(len(chosen))],
            norm=self.settings.norm,
            architecture=model.architecture,
            fuse=self.settings.combine == "fuse",
        )

    def _merges(
        self, model: Intermediate, scores: Mapping[int, Sequence[Mapping[Part, Tensor]]]
    ) -> Iterator[Candidate]:
        """Every ratio of the grid, of every span."""
        for start, pieces in scores.items():
            for shares in allocate.share_grid(len(pieces), self.settings.granularity):
                counts = self._counts(model, shares)
                op = self._op(model, start, pieces, counts, shares)
                yield Candidate(start=start, count=len(pieces), counts=counts, shares=shares, op=op)
