"""The work of a comparison: every row that is not there yet, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.activations.loop import Batches
from intarsia.commands.planning import heal_recipe
from intarsia.healing.teacher import TeacherStates, has_room
from intarsia.pruning.ladder import Ladder
from intarsia.recipe.recipe import Recipe
from intarsia.registry import Chosen, heal_stages
from intarsia.reporting.comparison import DENSE
from intarsia.stages.compare_folder import CompareFolder, Key
from intarsia.stages.compare_judge import Judge, missed, text_of
from intarsia.stages.compare_plans import Ladders, Rung, in_order
from intarsia.stages.source import Source


class Work:
    """A comparison under way."""

    def __init__(
        self,
        source: Source,
        folder: CompareFolder,
        judge: Judge,
        depths: Sequence[int],
        heals: Sequence[str],
        batch_tokens: int | None,
    ) -> None:
        self.source, self.folder, self.judge = source, folder, judge
        self.depths, self.heals, self.batch_tokens = depths, heals, batch_tokens
        self.ladders = Ladders(source, batch_tokens=batch_tokens)
        self.dense: Key = (DENSE, source.checkpoint.architecture.n_layers, "none")
        self._original: TeacherStates | None = None

    def close(self) -> None:
        """Free what the rows shared."""
        self.ladders.close()
        if self._original is not None:
            self._original.close()

    def missing(self, entrants: Sequence[Chosen]) -> list[Key]:
        """The rows that are not there yet."""
        wanted = [(entrant.label, depth, heal) for entrant in entrants for depth in self.depths for heal in self.heals]
        return [key for key in (self.dense, *wanted) if not self._has(key)]

    def run(self, entrants: Sequence[Chosen]) -> None:
        """Every row that is not there yet, the original's first: it also shows whether the tasks can be scored."""
        progress = self.source.progress
        total = 1 + len(entrants) * len(self.depths) * len(self.heals)
        kinds = {entrant.create().after_final_norm for entrant in entrants}
        if len(kinds) > 1:
            progress.say("two passes over the whole model: some methods measure the last layer after the final norm")
        with progress.task(f"comparing {len(entrants)} methods", total) as task:
            task.advance(total - len(self.missing(entrants)))
            if not self._has(self.dense):
                self._add(self.judge.dense())
                task.advance()
            for entrant in in_order(entrants):
                task.note(entrant.label)
                for row in self._rows(entrant):
                    self._tell_shared()
                    self._add(row)
                    task.advance()

    def _tell_shared(self) -> None:
        """Put what the shared pass took into the original's row: no method's row has it."""
        dense, spent = self.folder.rows[self.dense], self.ladders.shared_forwards
        if spent > (dense["layer_forwards"] or 0.0):
            self.folder.append({**dense, "layer_forwards": spent})

    def _rows(self, entrant: Chosen) -> Iterator[dict[str, Any]]:
        """A method's rows that are not there yet, as they come."""
        if all(self._has((entrant.label, depth, heal)) for depth in self.depths for heal in self.heals):
            return
        for rung in self.ladders.rungs(entrant, self.depths, self.folder.plan):
            for heal in self.heals:
                if self._has((entrant.label, rung.layers, heal)):
                    continue
                if rung.recipe is None or rung.run is None:
                    yield missed(entrant.label, rung, heal)
                else:
                    yield self._row(entrant, rung, rung.recipe, rung.run, heal)

    def _row(self, entrant: Chosen, rung: Rung, cut: Recipe, run: Path, heal: str) -> dict[str, Any]:
        recipe, where = cut, rung.path
        extra: dict[str, Any] = {}
        if heal == "closed-form":
            begun = time.perf_counter()
            ladder, stages = Ladder.existing(run), heal_stages.choose_all("closed-form")
            with ladder.run.opened():
                healed = heal_recipe(self.source, ladder, cut, stages, states=self._shared_original())
            assert healed is not None
            result = healed.stages[-1]
            recipe, where = healed.recipe, healed.path
            extra["heal_forwards"] = result.facts["forwards"]
            if result.fresh:  # else what it took is not known
                extra["heal_seconds"] = time.perf_counter() - begun
            if not result.taken:
                extra["note"] = "; ".join(filter(None, [rung.note, "the fit is no better, so it stays as it was cut"]))
        assert where is not None
        rows = list(self.folder.rows.values())
        relative = self.folder.relative(where)
        return self.judge.row(entrant.label, rung, recipe, heal=heal, where=relative, rows=rows) | extra

    def _shared_original(self) -> TeacherStates | None:
        """What all fits are held against: as the ladders measured it, or run once where there is room for all of it."""
        source, measured = self.source, self.ladders.original()
        if measured is not None or self._original is not None:
            return measured or self._original
        resident, progress = source.resident, source.progress
        batches = Batches(source.corpus, resident.device, batch_tokens=self.batch_tokens, progress=progress)
        room = source.placement.room(self.folder.path)
        if has_room(resident, batches, room):
            self._original = TeacherStates(resident, batches, keep=True, room=room, progress=progress)
        return self._original

    def _has(self, key: Key) -> bool:
        return self.judge.is_whole(self.folder.rows.get(key))

    def _add(self, row: Mapping[str, Any]) -> None:
        self.folder.append(row)
        self.source.progress.say(text_of(row))
