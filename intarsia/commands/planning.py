"""The work of a plan, as `plan`, `compress`, `compare` and `tailor` do it: check, estimate, step down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intarsia import progress
from intarsia.activations.architecture_checks import verified
from intarsia.commands.job import Job, pin_text, settings_of, target_depth, versions
from intarsia.commands.plan import PlanResult
from intarsia.data.corpus import Corpus
from intarsia.disk import read_json
from intarsia.errors import UserError
from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.flags import plain
from intarsia.healing.closed_form import Start
from intarsia.healing.pipeline import HealContext, Healed, passes_at_most, run_stages
from intarsia.healing.teacher import TeacherStates, fits_in_memory
from intarsia.model_name import lasting
from intarsia.options import Target
from intarsia.pruning.blocks import best_blocks, starts_of
from intarsia.pruning.estimate import estimate
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.prune import prune
from intarsia.pruning.step import Planner, mlp_pieces
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.registry import Chosen, planners
from intarsia.run_dir import RunDir

BASE = "base"
"""The name of the model in the recipes of a plan."""


class Planning:
    """A checked plan, ready to be worked on.

    Attributes:
        target: the depth to come to.
        estimate: its cost.
    """

    def __init__(
        self,
        job: Job,
        target: Target,
        method: Chosen,
        *,
        heals: int = 0,
        whole: Callable[[Planner], Intermediate] | None = None,
    ) -> None:
        """
        Args:
            heals: on how many tokens healing asks for the original's hidden states. A planner that decides on a part of
                the text measures no more.
            whole: gives the original, measured and kept, where other plans share it; it is not closed here then.

        Raises:
            UserError: the target cannot be reached by depth.
        """
        self.job, self.method = job, method
        self.planner: Planner = method.create()
        if (inspected := job.checkpoint.architecture.inspected) is not None and self.planner.joins:
            others = ", ".join(name for name in planners.names if not planners.choose(name).create().joins)
            raise UserError(
                f"{method.name} joins layers, and those of {job.model} can only be removed: {inspected.reason}.",
                f"Choose one that removes layers: {others}.",
            )
        self.heals, self._shared = heals, whole
        self._model: Intermediate | None = None
        job.checkpoint = verified(job.checkpoint)
        self.target = target_depth(target, job.checkpoint.architecture, job.checkpoint.parameters)
        # Tokens on which the original is measured.
        self.measured = job.spec.length
        if self.planner.plan_tokens is not None:
            self.measured = min(self.measured, max(self.planner.plan_tokens, heals))
        how: dict[str, Any] = {"tokens": job.spec.length, "measured": self.measured, "seq_len": job.spec.seq_len}
        self.estimate = estimate(job.checkpoint, self.planner, self.target, **how, dtype=job.dtype)

    def heal_passes_at_most(self, stages: Sequence[Chosen]) -> float:
        """Passes over the calibration text that heal stages take."""
        starts = self.planner.finalists + self.planner.blocks + (self.planner.in_loop is not None)
        return sum(passes_at_most(stages, self.job.checkpoint.architecture, starts=starts, tokens=self.job.spec.length))

    def weights(self, stages: Sequence[Chosen], *, evaluation: float) -> dict[str, float]:
        """Passes over the calibration text that each part of a compression takes, roughly."""
        writing = 2.5 * (1 + 2 / 8) if self.job.spec.writes else 0.1
        healing = self.estimate.block_passes_at_most + self.heal_passes_at_most(stages)
        first, others = self._passes()
        planning = first + others / 2  # most candidates leave the race early
        return {"text": writing, "planning": planning, "healing": healing, "building": 0.2, "evaluation": evaluation}

    def _passes(self) -> tuple[float, float]:
        """Passes over the calibration text: to measure the original, and at most for the steps."""
        first = self.measured / self.job.spec.length
        return first, max(0.0, self.estimate.passes_at_most - self.estimate.block_passes_at_most - first)

    @contextmanager
    def opened(self, run: RunDir) -> Iterator[Ladder]:
        """The run folder, started or resumed, for this process alone.

        Raises:
            UserError: the folder holds a run with other settings, or the text cannot be used: nothing is written then.
        """
        ladder = Ladder(run)
        settings = {
            **settings_of(run, self.job),
            "method": self.method.name,
            "planner": plain(self.method.settings),
            # A step of more than two layers is smaller at the end, so that the ladder depends on it.
            "target": self.target if self.planner.layers_at_once > 2 else None,
        }
        run.check(settings)
        if not ladder.reaches(self.target):
            _ = self.job.text.calibration  # a mistyped text must leave no folder
        try:
            with run.opened(settings):
                yield ladder
        finally:
            self.close()

    def close(self) -> None:
        """Free the model that is planned with."""
        if self._model is not None and self._shared is None:
            self._model.close()
        self._model = None

    def whole(self, scratch: Path) -> Intermediate:
        """The original, to be changed step by step; where the planner or healing needs that, measured, once.

        Args:
            scratch: where hidden states go that do not fit into memory.
        """
        planner, model = self.planner, self._model
        if self._shared is not None:
            model = self._shared(planner)
        elif model is None:
            how = {"after_final_norm": planner.after_final_norm}
            model = original(self.job, self.job.text.calibration.first(self.measured), scratch, **how)
            model.look_at(planner.plan_tokens)
            if planner.measures or planner.progressive or planner.blocks:
                model.refresh()
                fits = fits_in_memory(self.job.resident, model.batches, model.loop.memory_budget)
                if planner.blocks or (self.heals and fits):
                    model.keep()
        elif model.kept:
            model.rewind()
        model.look_at(planner.plan_tokens)
        model.criterion = planner.criterion
        self._model = model
        return model

    def states(self) -> TeacherStates | None:
        """The original's hidden states, where they were measured and kept."""
        return self._model.original() if self._model is not None and self._model.kept else None

    def starts(self, ladder: Ladder, recipe: Recipe) -> tuple[Start, ...]:
        """Other models of the same depth that the final heal starts from too: finalists of the method, and blocks."""
        architecture = self.job.checkpoint.architecture
        whole = identity(recipe.variant(recipe.base), recipe.depth).layers
        steps = [entry["evidence"] for entry in ladder.log() if entry["layers"] == len(recipe.layers)]
        others = self.planner.other_finalists(steps[0], whole, architecture) if steps else {}
        finalists = tuple(Start(name=name, recipe=recipe.with_layers(layers)) for name, layers in others.items())
        removed = recipe.depth - len(recipe.layers)
        if not self.planner.blocks or removed < 1:
            return finalists
        # The original without each of the best blocks of layers, recorded.
        name = f"blocks/layers-{len(recipe.layers):03d}.json"
        if not (ladder.path / name).is_file():
            model = self.whole(ladder.run.scratch)
            ladder.run.write_json(name, {"blocks": best_blocks(model, removed, self.planner.blocks)})
        remedy = "Delete it; the blocks are then compared again."
        found = read_json(ladder.path / name, expected="blocks of layers", remedy=remedy)
        return (*finalists, *starts_of(recipe, found["blocks"], architecture))

    def work(self, ladder: Ladder) -> PlanResult:
        """The steps that are missing, recorded in the run folder, which is open.

        Raises:
            UserError: the disk is full, the text has changed, or activations are not finite.
        """
        if ladder.reaches(self.target):
            progress.current().say(f"{ladder.path}: planned already")
            return self.result(ladder)
        pin_text(ladder.run, self.job)
        start = self._start(ladder)
        first, others = self._passes()
        with progress.current().task("", first + others):
            with progress.current().task("", 1, units=first):
                model = self.whole(ladder.run.scratch)
            before = 0.0 if self._shared is None else model.layer_forwards
            model.become(start.layers, start.fitted)
            with progress.current().task("", 1, units=others):
                stopped = prune(self.planner, model, start, self.target, ladder, spent=before)
        if stopped is not None:
            progress.current().say(f"stopped at {model.depth} layers: {stopped}")
        return self.result(ladder, model.layer_forwards - before, stopped)

    def result(
        self, ladder: Ladder | None = None, layer_forwards: float = 0.0, stopped: str | None = None
    ) -> PlanResult:
        """The result of a plan; without a ladder only its estimate."""
        log = [] if ladder is None else ladder.log()
        return PlanResult(
            model=self.job.model,
            method=self.method.name,
            run=None if ladder is None else ladder.path,
            layers=self.job.checkpoint.architecture.n_layers,
            target=self.target,
            depths=tuple(entry["layers"] for entry in log),
            losses=tuple(entry["loss"] for entry in log),
            layer_forwards=sum(entry["layer_forwards"] for entry in log) or layer_forwards,
            peak_memory_bytes=peak_memory_bytes(),
            stopped=stopped,
            estimate=self.estimate,
        )

    def _start(self, ladder: Ladder) -> Recipe:
        """The recipe to step down from: the last one of the ladder, or the whole model."""
        if depths := ladder.depths():
            return ladder.recipe(depths[-1])
        job, corpus = self.job, self.job.text.calibration
        variant = Variant(name=BASE, model=lasting(job.model), revision=job.revision, sha256=job.sha256)
        whole = identity(variant, job.checkpoint.architecture.n_layers)
        provenance: dict[str, Any] = {
            "method": self.method.name,
            "settings": plain(self.method.settings),
            "calibration": {
                "text": corpus.description,
                **{name: getattr(corpus, name) for name in ("tokens", "seq_len")},
                "seed": job.spec.seed,
                "sha256": corpus.sha256,
            },
            "dtype": str(job.resident.model.dtype).removeprefix("torch."),
            "device": job.device.type,
            "versions": versions(),
        }
        if job.checkpoint.architecture.is_mixture("mlp"):
            provenance["mlp_pieces"] = mlp_pieces(True)  # the recipe itself has their numbers alone
        return whole.with_layers(whole.layers, provenance=provenance)


def original(job: Job, text: Corpus, scratch: Path, *, after_final_norm: bool) -> Intermediate:
    """The whole model, not measured yet.

    Args:
        text: the calibration text, or a first part of it.
        scratch: where hidden states go that do not fit into memory.
        after_final_norm: whether the last layer is measured after the final norm.
    """
    return Intermediate(
        job.resident,
        text,
        identity(Variant(name=BASE, model=job.checkpoint.model), job.checkpoint.architecture.n_layers).layers,
        batch_tokens=job.runtime.batch_tokens,
        memory_budget=job.placement.memory_budget(scratch),
        after_final_norm=after_final_norm,
    )


def heal_recipe(
    planning: Planning, ladder: Ladder, recipe: Recipe, stages: Sequence[Chosen], *, states: TeacherStates | None = None
) -> Healed | None:
    """A recipe of a ladder, healed on the calibration text of its run, which is open; None without stages.

    Args:
        states: the original's hidden states on that text, where others than the plan know them.

    Raises:
        UserError: activations are not finite, or the calibration text is not the one of the run.
    """
    if not stages:
        return None
    job = planning.job
    pin_text(ladder.run, job)
    blocks, passes = planning.estimate.block_passes_at_most, planning.heal_passes_at_most(stages)
    with progress.current().task("", blocks + passes):
        with progress.current().task("", 1, units=blocks):
            starts = planning.starts(ladder, recipe)
        context = HealContext(
            run=ladder.run,
            variants={recipe.base: job.checkpoint},
            load=lambda: job.resident,
            device=job.device,
            calibration=job.text.calibration,
            selection=job.text.selection,
            starts=starts,
            states=planning.states() or states,
            release=planning.close,
            tokenizer=job.tokenizer,
            memory_bytes=job.runtime.memory_bytes,
            batch_tokens=job.runtime.batch_tokens,
            name=f"healed-{len(recipe.layers):03d}",
        )
        with progress.current().task("", 1, units=passes):
            return run_stages(context, recipe, stages)
