"""The ladders of a comparison: one pass over the whole model for all of its methods, a run folder for each.

The pass is kept, so a method that changes the model leaves the next one the whole model's hidden states and measures.
Methods that look behind the final norm need a pass of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.commands.plan import PlanResult
from intarsia.commands.planning import BASE, Planning
from intarsia.healing.teacher import TeacherStates
from intarsia.options import Target
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.recipe.recipe import Recipe
from intarsia.registry import Chosen
from intarsia.run_dir import RunDir
from intarsia.stages.source import Source


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A depth of a method's ladder: its recipe in the file `path` of the run folder `run`, or why there is none.

    `layer_forwards` and `seconds` are of all steps down to it, without the shared pass.
    """

    layers: int
    run: Path | None
    path: Path | None = None
    recipe: Recipe | None = None
    layer_forwards: float = 0.0
    seconds: float = 0.0
    note: str | None = None


class Ladders:
    """Makes ladders one after the other.

    Attributes:
        passes: how often the whole model was measured; `shared_forwards` is what that cost.
        layer_forwards: cost of all ladders that were made, without that.
    """

    def __init__(self, source: Source, *, batch_tokens: int | None) -> None:
        self.source, self.batch_tokens = source, batch_tokens
        self.passes = 0
        self.shared_forwards = 0.0
        self.layer_forwards = 0.0
        self._current: Intermediate | None = None
        self._is_kept = False

    def rungs(self, entrant: Chosen, depths: Sequence[int], place: Callable[[str], Path]) -> Iterator[Rung]:
        """The rungs at these depths, deepest model first.

        Where a step may take several layers, the ladder can pass a depth by; such a depth has a ladder of its own.
        """
        least = min(depths)
        leaps = entrant.create().layers_at_once > 2
        run = place(f"{folder_of(entrant)}-to-{least:03d}" if leaps else folder_of(entrant))
        planned = self._plan(entrant, run, least)
        for depth in sorted(depths, reverse=True):
            if depth in planned.depths:
                yield _rung(run, depth)
            elif leaps and depth != least:
                own = place(f"{folder_of(entrant)}-to-{depth:03d}")
                found = self._plan(entrant, own, depth)
                if depth in found.depths:
                    yield _rung(own, depth, note="a ladder of its own")
                else:
                    yield _missed(depth, found)
            else:
                yield _missed(depth, planned)

    def measure_whole(self, *, behind_final_norm: bool) -> Intermediate:
        """The model in the middle, whole and measured."""
        current = self._model(behind_final_norm)
        if self._is_kept:
            current.rewind()
            return current
        before = current.layer_forwards
        current.become(_whole(self.source))
        current.refresh()
        current.keep()
        self._is_kept = True
        self.passes += 1
        self.shared_forwards += current.layer_forwards - before
        return current

    def original(self) -> TeacherStates | None:
        """The hidden states of the whole model, where it was measured and is kept: good until the next ladder."""
        return self._current.original(len(self.source.corpus)) if self._current is not None and self._is_kept else None

    def close(self) -> None:
        """Free the hidden states."""
        if self._current is not None:
            self._current.close()
        self._current, self._is_kept = None, False

    def _plan(self, entrant: Chosen, run: Path, target: int) -> PlanResult:
        planning = Planning(self.source, Target(layers=target), entrant)
        planner, behind = planning.planner, planning.planner.after_final_norm
        before = Ladder(run).log()

        def shared() -> Intermediate:
            # A ladder that goes on where it was stopped is measured from its last rung.
            if not before and (planner.progressive or planner.measures):
                return self.measure_whole(behind_final_norm=behind)
            current = self._model(behind)
            if self._is_kept:
                current.rewind()
            return current

        with planning.opened(RunDir(run)) as ladder:
            planned = planning.work(ladder, shared)
        self.layer_forwards += planned.layer_forwards - sum(entry["layer_forwards"] for entry in before)
        return planned

    def _model(self, behind_final_norm: bool) -> Intermediate:
        if self._current is not None and self._current.behind_final_norm != behind_final_norm:
            self.close()
        if self._current is None:
            self._current = Intermediate(
                self.source.resident,
                self.source.corpus,
                _whole(self.source),
                batch_tokens=self.batch_tokens,
                behind_final_norm=behind_final_norm,
                progress=self.source.progress,
            )
        return self._current


def folder_of(entrant: Chosen) -> str:
    """The name of a method's run folder: that of `come[norm=average]` is `come-norm-average`."""
    return re.sub(r"[\[,=]", "-", entrant.label.rstrip("]"))


def in_order(entrants: Sequence[Chosen]) -> list[Chosen]:
    """Those that share a pass one after the other, in the order given."""
    return sorted(entrants, key=lambda entrant: bool(entrant.create().after_final_norm))


def _whole(source: Source) -> list[Op]:
    return [
        Select(source=LayerRef(variant=BASE, layer=layer)) for layer in range(source.checkpoint.architecture.n_layers)
    ]


def _rung(run: Path, depth: int, note: str | None = None) -> Rung:
    folder = Ladder(run)
    steps: list[Mapping[str, Any]] = [entry for entry in folder.log() if entry["layers"] >= depth]
    return Rung(
        layers=depth,
        run=run,
        path=folder.recipe_path(depth),
        recipe=folder.recipe(depth),
        layer_forwards=sum(step["layer_forwards"] for step in steps),
        seconds=sum(step["seconds"] for step in steps),
        note=note,
    )


def _missed(depth: int, planned: PlanResult) -> Rung:
    least = planned.depths[-1] if planned.depths else planned.layers
    why = planned.stopped or f"the ladder passes from above it to {least}"
    return Rung(layers=depth, run=None, note=f"not reached: {why}")
