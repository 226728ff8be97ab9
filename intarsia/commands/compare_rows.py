"""Rows of a comparison: the methods' ladders from one shared pass, and the measures of each model."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia import progress
from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.evaluate import load_whole
from intarsia.commands.job import Job
from intarsia.commands.plan import PlanResult
from intarsia.commands.planning import Planning, heal_recipe, original
from intarsia.data.corpus import Corpus
from intarsia.evaluation.agreement import Asked, Reference, doubt
from intarsia.evaluation.perplexity import model_of, perplexity
from intarsia.evaluation.results import TaskResults, with_retention
from intarsia.evaluation.speed import compare_speed
from intarsia.evaluation.tasks import TaskPlan, score_tasks
from intarsia.healing.teacher import TeacherStates, fits_in_memory
from intarsia.options import Target
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.step import Planner
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.registry import Chosen
from intarsia.reporting.comparison import DENSE, Key, Row, read_rows
from intarsia.run_dir import Log, RunDir

if TYPE_CHECKING:
    from intarsia.commands.compare import CompareEval


PLANS = "plans"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A depth of a method's ladder, or why the method does not reach it."""

    layers: int
    # None if it was not reached.
    ladder: Ladder | None = None
    planning: Planning | None = None
    recipe: Recipe | None = None
    # Layer-forwards of all steps down to it, without the shared pass.
    layer_forwards: float = 0.0
    seconds: float = 0.0
    note: str | None = None


class Ladders:
    """Plans ladders one after the other, each in a run folder of its own.

    Attributes:
        passes: number of passes that measured the whole model; `shared_forwards` is their cost.
        layer_forwards: cost of all ladders without these passes.
    """

    def __init__(self, job: Job, out: Path) -> None:
        self.job, self.out = job, out
        self.passes = 0
        self.shared_forwards = 0.0
        self.layer_forwards = 0.0
        self._current: Intermediate | None = None
        self._original: TeacherStates | None = None

    def rungs(self, method: Chosen, depths: Sequence[int]) -> Iterator[Rung]:
        """The rungs at these depths, deepest model first.

        If a step may remove several layers, a ladder can skip a depth; that depth gets a ladder of its own.
        """
        # The folder of `come[norm=average]` is `come-norm-average`.
        least = min(depths)
        name = re.sub(r"[\[,=]", "-", method.label.rstrip("]"))
        leaps = method.create().layers_at_once > 2
        whole = self._plan(method, f"{name}-to-{least:03d}" if leaps else name, least)
        for depth in sorted(depths, reverse=True):
            (planning, ladder, planned), note = whole, None
            if leaps and depth not in (*planned.depths, least):
                planning, ladder, planned = self._plan(method, f"{name}-to-{depth:03d}", depth)
                note = "a ladder of its own"
            if depth not in planned.depths:
                above = planned.depths[-1] if planned.depths else planned.layers
                why = planned.stopped or f"the ladder skips it, and stops at {above}"
                yield Rung(layers=depth, note=f"not reached: {why}")
                continue
            steps = [entry for entry in ladder.log() if entry["layers"] >= depth]
            yield Rung(
                layers=depth,
                planning=planning,
                ladder=ladder,
                recipe=ladder.recipe(depth),
                layer_forwards=sum(step["layer_forwards"] for step in steps),
                seconds=sum(step["seconds"] for step in steps),
                note=note,
            )

    def healed(self, rung: Rung, stages: Sequence[Chosen]) -> tuple[Recipe, Path, dict[str, Any]]:
        """The recipe of a rung after these heal stages, its file, and facts of the healing for the row.

        Their common teacher is measured once, if it fits into memory.
        """
        assert rung.recipe is not None and rung.ladder is not None and rung.planning is not None
        started = time.perf_counter()
        if not stages:
            return rung.recipe, rung.ladder.recipe_path(rung.layers), {}
        with rung.ladder.run.opened():
            found = heal_recipe(rung.planning, rung.ladder, rung.recipe, stages, states=self._states())
        assert found is not None
        results = found.stages[1:]
        kept = None if found.taken else "the fit is no better, so this is the pruned model"
        facts = {
            "heal_forwards": sum(result.facts.get("forwards", 0) for result in results) or None,
            "heal_seconds": time.perf_counter() - started if all(result.fresh for result in results) else None,
            "note": "; ".join(filter(None, [rung.note, kept])) or None,
        }
        return found.recipe, found.path, facts

    def close(self) -> None:
        for each in (self._current, self._original):
            if each is not None:
                each.close()
        self._current, self._original = None, None

    def _plan(self, method: Chosen, name: str, target: int) -> tuple[Planning, Ladder, PlanResult]:
        planning = Planning(self.job, Target(layers=target), method, whole=self._measured)
        run = RunDir(self.out / PLANS / name)
        before = Ladder(run).log()
        with planning.opened(run) as ladder:
            planned = planning.work(ladder)
        self.layer_forwards += planned.layer_forwards - sum(entry["layer_forwards"] for entry in before)
        return planning, ladder, planned

    def _measured(self, planner: Planner) -> Intermediate:
        """The original; measured if the planner needs it, once for all methods that measure it in the same way."""
        current = self._current
        if current is not None and current.after_final_norm != planner.after_final_norm:
            current.close()
            current = None
        if current is None:
            final = planner.after_final_norm
            current = self._current = original(
                self.job, self.job.text.calibration, RunDir(self.out).scratch, after_final_norm=final
            )
        if current.kept:
            current.rewind()
        elif planner.progressive or planner.measures or planner.blocks:
            current.look_at(None)
            if self.passes:
                progress.current().say(
                    "another pass over the whole model: this method measures it after the final norm"
                )
            before = current.layer_forwards
            current.refresh()
            current.keep()
            self.passes += 1
            self.shared_forwards += current.layer_forwards - before
        return current

    def _states(self) -> TeacherStates | None:
        """The original's hidden states: from the ladders, or from one pass if all fit into memory."""
        corpus, resident = self.job.text.calibration, self.job.resident
        if self._current is not None and self._current.kept and (found := self._current.original()) is not None:
            return found
        if self._original is None:
            batches = Batches(corpus, resident.device, batch_tokens=self.job.runtime.batch_tokens)
            memory_budget = self.job.placement.memory_budget(RunDir(self.out).scratch)
            if fits_in_memory(resident, batches, memory_budget):
                self._original = TeacherStates(Loop(resident, batches, memory_budget=memory_budget), keep=True)
        return self._original


class Rows:
    """The measured rows; measures new ones.

    Attributes:
        dense_key: the key of the original's row.
    """

    def __init__(
        self,
        job: Job,
        log: Log,
        texts: Mapping[str, Corpus],
        tasks: TaskPlan | None,
        asked: Asked | None,
        evaluation: CompareEval,
    ) -> None:
        """
        Args:
            log: a line for each row; the last line about a model counts.
            texts: evaluation texts for perplexity, by name.
            tasks: to score models on; None for none.
            asked: prompts for every model; None for none.
        """
        self.job, self.log, self.texts = job, log, texts
        self.tasks, self.asked, self.evaluation = tasks, asked, evaluation
        self.rows = {row.key: row for row in read_rows(log.path)}
        self.dense_key: Key = (DENSE, job.checkpoint.architecture.n_layers, "none")

    def has(self, key: Key) -> bool:
        """Whether a row has all measures of this call."""
        return key in self.rows and self._is_whole(self.rows[key])

    def has_model(self, name: str, job: Job) -> bool:
        """The same for an existing model, as long as it has the same weights."""
        row = self.rows.get((name, job.checkpoint.architecture.n_layers, "none"))
        return row is not None and row.weights_sha256 == job.sha256 and self._is_whole(row)

    def add(self, row: Row) -> None:
        self._keep(row)
        progress.current().say(row.line)

    def add_shared(self, layer_forwards: float) -> None:
        """Record the cost of the shared pass in the original's row; no method's row contains it."""
        dense = self.rows[self.dense_key]
        if layer_forwards > (dense.layer_forwards or 0.0):
            self._keep(replace(dense, layer_forwards=layer_forwards))

    def _keep(self, row: Row) -> None:
        self.log.append(asdict(row))
        self.rows[row.key] = row

    def dense(self) -> Row:
        return self._with_measures(_whole(DENSE, self.job), self._model(None), self.job.model, dense=None)

    def existing(self, name: str, job: Job) -> Row:
        row = replace(_whole(name, job), weights_sha256=job.sha256)
        return self._doubted(self._with_measures(row, load_whole(job), name, dense=self.rows[self.dense_key]))

    def measured(self, row: Row, rung: Rung, recipe: Recipe, path: Path, facts: Mapping[str, Any]) -> Row:
        """The row of a recipe's model; the measures of an equal model in an earlier row are reused.

        Args:
            path: the recipe's file.
            facts: facts of its healing.
        """
        checkpoint = self.job.checkpoint
        row = replace(
            row,
            parameters=checkpoint.parameters - (recipe.depth - row.layers) * checkpoint.architecture.layer_parameters,
            bytes=_built_bytes(recipe, checkpoint),
            layer_forwards=rung.layer_forwards,
            plan_seconds=rung.seconds,
            recipe=path.relative_to(self.log.path.parent).as_posix(),
            recipe_sha256=schema.content_hash(recipe),
            **facts,
        )
        for other in self.rows.values():
            if other.recipe_sha256 == row.recipe_sha256 and self._is_whole(other):
                names = ("perplexity", "answers", "tasks", "speed")
                return self._doubted(replace(row, **{name: getattr(other, name) for name in names}))
        dense = self.rows[self.dense_key]
        return self._doubted(self._with_measures(row, self._model(recipe), row.full_name, dense=dense))

    def _model(self, recipe: Recipe | None) -> Any:
        """A recipe's model, or the original."""
        return model_of(recipe, self.job.resident, memory_budget=self.job.placement.memory_budget())

    def _doubted(self, row: Row) -> Row:
        """The row, with a warning if perplexity or tasks are good and the answers are not."""

        def measures(row: Row) -> dict[str, Any]:
            text, tasks = next(iter(self.texts), ""), row.tasks or {}
            return {**(row.answers or {}), "perplexity": row.perplexity.get(text), "accuracy": tasks.get("mean")}

        found = doubt(measures(self.rows[self.dense_key]), measures(row))
        return replace(row, note="; ".join(filter(None, [row.note, found])) or None)

    def _wants_tasks(self, layers: int) -> bool:
        """Whether to score models of this depth on tasks; the original always is."""
        depths = self.evaluation.task_layers
        return self.tasks is not None and (depths is None or layers in (*depths, self.dense_key[1]))

    def _is_whole(self, row: Row) -> bool:
        if row.parameters is None:
            return True  # there is no such model
        tasks = row.tasks is not None or not self._wants_tasks(row.layers)
        if not tasks or (self.evaluation.speed and row.speed is None):
            return False
        found, asked = row.answers, self.asked
        if asked is None:
            return True
        same = found is not None and found["asked"] == [asked.answers, asked.answer_tokens]
        return same and (asked.prompts is None or (found or {})["sha256"] == asked.prompts.sha256)

    @cached_property
    def reference(self) -> Reference:
        """The original's answers, generated once per command."""
        assert self.asked is not None
        return self.asked.answered(self._model(None), seed=self.job.spec.seed, key=self.job.sha256)

    def _with_measures(self, row: Row, model: Any, name: str, dense: Row | None) -> Row:
        perplexities = {}
        for text, corpus in self.texts.items():
            found = perplexity(model, corpus)
            facts = {"nll": found.nll, "windows": found.windows, "sha256": found.text_sha256}
            perplexities[text] = {**found.measure, **facts}
        answers = None
        if self.asked is not None:
            theirs = None if dense is None else self.reference.follow(model)
            agreed = self.reference.itself() if theirs is None else self.reference.score(theirs, self._model(None))
            answers = {**asdict(agreed), "asked": [self.asked.answers, self.asked.answer_tokens]}
        return replace(
            row,
            perplexity=perplexities,
            answers=answers,
            tasks=self._tasks(model, name, dense) if self._wants_tasks(row.layers) else None,
            speed=self._speed(model, dense) if self.evaluation.speed else None,
        )

    def _tasks(self, model: Any, name: str, dense: Row | None) -> dict[str, Any]:
        assert self.tasks is not None
        found = score_tasks(self.tasks, model, self.job.tokenizer, name=name)
        if dense is not None and dense.tasks is not None:
            found = with_retention(TaskResults.from_dict(dense.tasks), found)
        return found.to_dict()

    def _speed(self, model: Any, dense: Row | None) -> dict[str, Any]:
        """Measure in turns with the original, so that other load on the machine affects both."""
        models = {"this": model, **({} if dense is None else {"dense": self.job.resident.model})}
        found = {name: asdict(speed) for name, speed in compare_speed(models).items()}
        return {**found.pop("this"), **found}


def _whole(name: str, job: Job) -> Row:
    """The row of an existing model, without its measures."""
    checkpoint = job.checkpoint
    layers = checkpoint.architecture.n_layers
    return Row(method=name, layers=layers, parameters=checkpoint.parameters, bytes=checkpoint.nbytes)


def _built_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Bytes of the weights that a build writes."""
    architecture = checkpoint.architecture

    def layer(index: int) -> int:
        return sum(
            checkpoint.headers[architecture.tensor_name(index, local)].nbytes
            for local in architecture.layer_shapes(index)
        )

    outside = checkpoint.nbytes - sum(layer(index) for index in range(architecture.n_layers))
    return outside + sum(layer(op.sources[0].layer) for op in recipe.layers)
