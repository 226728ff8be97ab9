"""Ladders of the methods of a comparison, one after the other, over one pass of the whole model."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia import progress
from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.commands.job import Job
from intarsia.commands.plan import PlanResult
from intarsia.commands.planning import Planning, heal_recipe, original
from intarsia.healing.teacher import TeacherStates, fits_in_memory
from intarsia.options import Target
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.step import Planner
from intarsia.recipe.recipe import Recipe
from intarsia.registry import Chosen
from intarsia.run_dir import RunDir

PLANS = "plans"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A depth of a method's ladder, or why the method does not come to it."""

    layers: int
    # None where there is no such model.
    ladder: Ladder | None = None
    planning: Planning | None = None
    recipe: Recipe | None = None
    # Of all steps down to it, without the shared pass.
    layer_forwards: float = 0.0
    seconds: float = 0.0
    note: str | None = None


class Ladders:
    """Makes ladders one after the other, each in a run folder of its own.

    Attributes:
        passes: how often the whole model was measured; `shared_forwards` is what that cost.
        layer_forwards: cost of all ladders that were made, without that.
    """

    def __init__(self, job: Job, out: Path) -> None:
        self.job, self.out = job, out
        self.passes = 0
        self.shared_forwards = 0.0
        self.layer_forwards = 0.0
        self._current: Intermediate | None = None
        self._is_kept = False
        self._original: TeacherStates | None = None

    def rungs(self, method: Chosen, depths: Sequence[int]) -> Iterator[Rung]:
        """The rungs at these depths, deepest model first.

        Where a step may take several layers, the ladder can pass a depth by; such a depth has a ladder of its own.
        """
        # The folder of `come[norm=average]` is `come-norm-average`.
        least, name = min(depths), re.sub(r"[\[,=]", "-", method.label.rstrip("]"))
        leaps = method.create().layers_at_once > 2
        planned = self._plan(method, f"{name}-to-{least:03d}" if leaps else name, least)
        for depth in sorted(depths, reverse=True):
            found, note = planned, None
            if leaps and depth not in (*planned[2].depths, least):
                found, note = self._plan(method, f"{name}-to-{depth:03d}", depth), "a ladder of its own"
            yield _rung(*found, depth, note)

    def healed(self, rung: Rung, stages: Sequence[Chosen]) -> tuple[Recipe, Path, dict[str, Any]]:
        """The recipe of a rung with these heal stages, its file, and what a row says of the healing.

        Their common teacher is measured once, where there is memory for it.
        """
        assert rung.recipe is not None and rung.ladder is not None and rung.planning is not None
        started = time.perf_counter()
        if not stages:
            return rung.recipe, rung.ladder.recipe_path(rung.layers), {}
        with rung.ladder.run.opened():
            found = heal_recipe(rung.planning, rung.ladder, rung.recipe, stages, states=self._states())
        assert found is not None
        results = found.stages[1:]
        kept = None if found.taken else "the fit is no better, so it stays as it was pruned"
        facts = {
            "heal_forwards": sum(result.facts.get("forwards", 0) for result in results) or None,
            "heal_seconds": time.perf_counter() - started if all(result.fresh for result in results) else None,
            "note": "; ".join(filter(None, [rung.note, kept])) or None,
        }
        return found.recipe, found.path, facts

    def close(self) -> None:
        """Free the hidden states."""
        self._close_current()
        if self._original is not None:
            self._original.close()
            self._original = None

    def _plan(self, method: Chosen, name: str, target: int) -> tuple[Planning, Ladder, PlanResult]:
        planning = Planning(self.job, Target(layers=target), method, whole=self._measured)
        run = RunDir(self.out / PLANS / name)
        before = Ladder(run).log()
        with planning.opened(run) as ladder:
            planned = planning.work(ladder)
        self.layer_forwards += planned.layer_forwards - sum(entry["layer_forwards"] for entry in before)
        return planning, ladder, planned

    def _measured(self, planner: Planner) -> Intermediate:
        """The original; measured where the planner needs that, once for all methods that measure it alike."""
        current = self._model(planner.after_final_norm)
        if self._is_kept:
            current.rewind()
        if self._is_kept or not (planner.progressive or planner.measures or planner.blocks):
            return current
        current.look_at(None)
        if self.passes:
            progress.current().say("another pass over the whole model: this method measures it after the final norm")
        before = current.layer_forwards
        current.refresh()
        current.keep()
        self._is_kept = True
        self.passes += 1
        self.shared_forwards += current.layer_forwards - before
        return current

    def _states(self) -> TeacherStates | None:
        """The original's hidden states: as the ladders measured it, or run once where there is memory for all."""
        corpus, resident = self.job.text.calibration, self.job.resident
        if self._current is not None and self._is_kept and (found := self._current.original()) is not None:
            return found
        if self._original is None:
            placed = self.job.placement
            batches = Batches(corpus, resident.device, batch_tokens=placed.batch_tokens)
            memory_budget = placed.memory_budget(RunDir(self.out).scratch)
            if fits_in_memory(resident, batches, memory_budget):
                self._original = TeacherStates(Loop(resident, batches, memory_budget=memory_budget), keep=True)
        return self._original

    def _close_current(self) -> None:
        if self._current is not None:
            self._current.close()
        self._current, self._is_kept = None, False

    def _model(self, after_final_norm: bool) -> Intermediate:
        if self._current is not None and self._current.after_final_norm != after_final_norm:
            self._close_current()
        if self._current is None:
            self._current = original(self.job, RunDir(self.out).scratch, after_final_norm=after_final_norm)
        return self._current


def _rung(planning: Planning, ladder: Ladder, planned: PlanResult, depth: int, note: str | None) -> Rung:
    if depth not in planned.depths:
        least = planned.depths[-1] if planned.depths else planned.layers
        why = planned.stopped or f"the ladder passes from above it to {least}"
        return Rung(layers=depth, note=f"not reached: {why}")
    steps: list[Mapping[str, Any]] = [entry for entry in ladder.log() if entry["layers"] >= depth]
    return Rung(
        layers=depth,
        planning=planning,
        ladder=ladder,
        recipe=ladder.recipe(depth),
        layer_forwards=sum(step["layer_forwards"] for step in steps),
        seconds=sum(step["seconds"] for step in steps),
        note=note,
    )
