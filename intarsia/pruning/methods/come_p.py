"""CoMe-P: CoMe, with the span and its ratio chosen by the calibration loss of the merged model.

Source: Wang et al., Layer as Puzzle Pieces, arXiv 2510.15304, which tries the ratios of one span, as `--preset paper`
does. By default the ratios of several spans are raced, and with `removals` also the plain removal of each layer.

A ratio with zero shares is a removal too, but the two differ when steps are healed: after a removal, the remaining
layers keep their fitted tensors; a merge gives a new layer without any. If both give the same layers, the removal is
tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from intarsia.healing.settings import Check
from intarsia.pruning import scores as allocate
from intarsia.pruning.methods.come import Candidate, Come, ComeSettings, Scores
from intarsia.pruning.race import mean_loss, share_at_most
from intarsia.pruning.step import Change, without_half_layers
from intarsia.recipe.recipe import Op
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


@dataclass(frozen=True, kw_only=True)
class ComePSettings(ComeSettings):
    """How CoMe-P decides."""

    # Grid steps of the ratio between 0 and 1.
    granularity: int = 10
    # Try the ratios of the N spans of least influence.
    spans: int = 3
    # Also try to drop each layer (with --merge M, each run of M - 1 layers).
    removals: bool = False
    # Also try separate shares for attention and MLP: removals shifted by half a layer, and ratios around the best one.
    half_layers: bool = False
    # Eliminate candidates that are clearly worse than the best on part of the calibration text.
    racing: bool = True

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            **ComeSettings.presets["paper"],
            "spans": 1,
            "removals": False,
            "half_layers": False,
            "racing": False,
            "blocks": 0,
            "plan_tokens": None,
            "criterion": "loss",
        },
    }

    def checks(self) -> Iterator[Check]:
        yield from super().checks()
        yield from self.at_least(1, "granularity", "spans")
        if self.half_layers:
            yield self.combine != "weight-sum", ("combine",), "concat or fuse: half layers join pieces"


@planner("come-p", settings=ComePSettings, paper="2510.15304")
class ComeP(Come):
    """Concatenate adjacent layers, at the ratio of least calibration loss."""

    settings: ComePSettings

    def __init__(self, settings: ComePSettings) -> None:
        super().__init__(settings)
        self.joins = not settings.removals

    def choose(
        self, model: Intermediate, ranked: Sequence[int], count: int, pieces: Callable[[int], Scores]
    ) -> tuple[Candidate | None, dict[str, Any]]:
        """The ratios of some spans, and removals, raced by calibration loss."""
        drops, halves = self.settings.removals, self.settings.half_layers
        if not ranked and not drops:
            return None, {}
        spans = ranked[: self.settings.spans]
        every = [
            Candidate(start=start, count=count - 1, op=None) for start in (model.droppable(count - 1) if drops else ())
        ]
        every += self._half_removals(model, ranked, count) if halves else ()
        for start in spans:
            scores = [pieces(index) for index in range(start, start + count)]
            grid = allocate.share_grid(count, self.settings.granularity)
            every += [self.candidate(model, start, scores, shares) for shares in grid]
        tried = distinct(model, every)
        if not tried:
            return None, {}
        title = f"trying {len(tried)} ratios" + (f" of {len(spans)} spans" if len(spans) > 1 else "")
        title += " and removals" if drops else ""
        best, shown = self._raced(model, tried, title)
        if halves and count == 2:
            around = distinct(model, [best, *self._around(model, best, pieces)])
            if len(around) > 1:
                best, more = self._raced(model, around, f"trying {len(around)} ratios around the best")
                shown += more
        return best, {"grid": shown}

    def _raced(
        self, model: Intermediate, tried: Sequence[Candidate], title: str
    ) -> tuple[Candidate, list[dict[str, Any]]]:
        """The candidate of least calibration loss; and the losses of all."""
        changes = [
            Change(start=each.start, count=each.count, ops=() if each.op is None else (each.op,)) for each in tried
        ]
        best, sums = model.race(changes, racing=self.settings.racing, title=title)
        shown = [
            {
                "start": each.start,
                **({"dropped": each.count} if each.op is None else {}),
                "ratios": list(each.shares),
                **({"mlp_ratios": list(each.mlp_shares)} if each.mlp_shares != each.shares else {}),
                "sequences": sums[index].numel(),
                "loss": mean_loss(sums[index], model.counts_N),
            }
            for index, each in enumerate(tried)
        ]
        return tried[best], shown

    def tried_forwards(self, after: int, count: int, sequences: int) -> float:
        """Each candidate re-runs the layers after it until it is eliminated."""
        ratios = min(self.settings.spans, after) * math.comb(self.settings.granularity + count - 1, count - 1)
        drops = (after + 1 if self.settings.removals else 0) + (after + 16 if self.settings.half_layers else 0)
        share = share_at_most(max(ratios + drops, 1), sequences, racing=self.settings.racing)
        return share * (ratios * after + drops * after / 2)

    def _half_removals(self, model: Intermediate, starts: Sequence[int], count: int) -> Iterator[Candidate]:
        """Every removal from the MLP of a layer to the attention of the last of `count` layers."""
        groups, channels = model.architecture.n_kv_heads, model.architecture.n_pieces("mlp")
        between = [0.0] * (count - 2)
        for start in starts:
            op = without_half_layers(model, start, count, self.settings.norm)
            if op is not None:
                yield Candidate(
                    start=start,
                    count=count,
                    op=op,
                    shares=[1.0, *between, 0.0],
                    mlp_shares=[0.0, *between, 1.0],
                    counts=((groups, 0), *[(0, 0) for _ in between], (0, channels)),
                )

    def _around(self, model: Intermediate, best: Candidate, pieces: Callable[[int], Scores]) -> Iterator[Candidate]:
        """The neighbours of the best on the grid of attention and MLP shares of two layers.

        A removed layer is a corner of two squares: with the layer before it, and with the layer after it.
        """
        centres = [(best.start, best.shares[0], best.mlp_shares[0])] if best.op is not None else []
        if best.op is None:
            centres = [(best.start - 1, 1.0, 1.0), (best.start, 0.0, 0.0)]
        step = 1.0 / self.settings.granularity
        for start, attention, mlp in centres:
            if not (0 <= start < model.depth - 1 and self._allowed(model, start, 2)):
                continue
            scores = [pieces(start), pieces(start + 1)]
            for a, m in itertools.product(
                (attention - step, attention, attention + step), (mlp - step, mlp, mlp + step)
            ):
                if -1e-9 < a < 1 + 1e-9 and -1e-9 < m < 1 + 1e-9:
                    yield self.candidate(model, start, scores, (a, 1.0 - a), (m, 1.0 - m))


def distinct(model: Intermediate, candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first of all candidates with the same layers: two ratios may round to the same counts, and two spans may
    drop the same layer."""
    found: dict[tuple[Op, ...], Candidate] = {}
    for each in candidates:
        put_in = () if each.op is None else (each.op,)
        layers = (*model.ops[: each.start], *put_in, *model.ops[each.start + each.count :])
        found.setdefault(layers, each)
    return list(found.values())
