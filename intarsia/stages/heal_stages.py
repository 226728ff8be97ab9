"""The stages of healing, one after the other, each recorded in the run folder before the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from intarsia.activations.loop import Batches
from intarsia.building.loaded_model import Resident, load_model
from intarsia.checkpoint.hashing import cache_folder, scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.healing import closed_form, end_to_end, launch, layerwise
from intarsia.healing.end_to_end import lesson_depths
from intarsia.healing.quality import quality
from intarsia.healing.restarts import best_fit, forget, starts
from intarsia.healing.settings import ClosedFormSettings, EndToEndSettings, LayerwiseSettings
from intarsia.healing.teacher import Teacher, TeacherSource, TeacherStates, has_room
from intarsia.healing.training import Text
from intarsia.progress import Progress
from intarsia.recipe.recipe import Recipe
from intarsia.stages.heal_record import StageResult, read_result, write_result
from intarsia.stages.heal_texts import Texts
from intarsia.stages.placement import Placement, refuse_self_text

CUT = "cut"  # the model as it came
STAGES = ("closed-form", "layerwise", "end-to-end")


def stage_settings(
    stages: Sequence[str], closed_form: ClosedFormSettings, layerwise: LayerwiseSettings, end_to_end: EndToEndSettings
) -> dict[str, Any]:
    """The settings of the stages that run, for the run folder. Where logs go decides nothing."""
    found: dict[str, Any] = {
        "closed-form": asdict(closed_form),
        "layerwise": layerwise.to_dict(),
        "end-to-end": {key: value for key, value in end_to_end.to_dict().items() if key != "log"},
    }
    return {stage: found[stage] for stage in STAGES if stage in stages}


@dataclass(frozen=True, kw_only=True)
class Healing:
    """Everything that the stages share. `teacher` is None where the recipe's base teaches."""

    recipe: Recipe
    variants: Mapping[str, Checkpoint]
    teacher: Checkpoint | None
    run: Path
    placement: Placement
    closed_form: ClosedFormSettings
    layerwise: LayerwiseSettings
    end_to_end: EndToEndSettings
    barrier: Callable[[], None]
    progress: Progress

    @property
    def base(self) -> Checkpoint:
        """The recipe's base."""
        return self.variants[self.recipe.base]

    @cached_property
    def resident(self) -> Resident:
        """The base in memory; of a streamed one all but its layers."""
        others = {name: checkpoint for name, checkpoint in self.variants.items() if name != self.recipe.base}
        return self.placement.resident(self.base, others)

    @cached_property
    def teaching(self) -> Resident:
        """The teacher in memory."""
        return self.resident if self.teacher is None else self.placement.resident(self.teacher)

    @cached_property
    def teacher_sha256(self) -> str:
        """Which weights teach."""
        return scan(self.teacher or self.base, self.progress)

    def writer(self) -> PreTrainedModel:
        """The model, to write text with.

        Raises:
            UserError: it is streamed.
        """
        if self.placement.stream:
            raise refuse_self_text("--data")
        return self.resident.model

    def run_stages(self, stages: Sequence[str], texts: Texts) -> list[StageResult]:
        """Run the stages, or find what an earlier run has finished; the first result is the model as it came.

        Every launched process calls this; only end-to-end training needs them all.
        """
        main = launch.rank() == 0
        results: list[StageResult] = []
        for number, stage in enumerate((CUT, *stages)):
            record = self.run / "stages" / f"{number}-{stage}"
            work = self.run / f"{number}-{stage}"
            if not record.with_suffix(".json").exists() and (main or stage == "end-to-end"):
                begun = time.perf_counter()
                recipe, details = self._stage(stage, results[-1].recipe if results else self.recipe, texts, work)
                seconds = time.perf_counter() - begun
                if main:
                    write_result(record, self._judged(stage, recipe, details, seconds, results, texts))
            self.barrier()
            results.append(read_result(record))
            if main and stage == "end-to-end":
                end_to_end.clear(work)
            if main and stage == "closed-form":
                forget(work)
        return results

    def _judged(
        self,
        stage: str,
        recipe: Recipe,
        details: list[dict[str, Any]],
        seconds: float,
        results: Sequence[StageResult],
        texts: Texts,
    ) -> StageResult:
        """A stage's recipe with its quality; or the recipe before it, where the stage made it no better."""
        found = quality(
            recipe,
            self.resident,
            texts.held_out,
            texts.evaluation,
            room=self.placement.room(self.run),
            progress=self.progress,
        ).to_dict()
        corpus = texts.fit if stage == "closed-form" else texts.train
        taken = True
        if results:
            before, after = (data["texts"][0]["value"] for data in (results[-1].quality, found))
            taken = after < before
            change = f"held-out perplexity {before:.2f} -> {after:.2f}"
            self.progress.say(f"{stage}: {change}" + ("" if taken else "; no better, so the model stays as it was"))
            if not taken:
                recipe, found = results[-1].recipe, results[-1].quality
        return StageResult(
            stage=stage,
            recipe=recipe,
            quality=found,
            taken=taken,
            tokens=corpus.tokens if results else 0,
            seconds=seconds if results else 0.0,
            details=details,
        )

    def _stage(self, stage: str, recipe: Recipe, texts: Texts, folder: Path) -> tuple[Recipe, list[dict[str, Any]]]:
        if stage == CUT:
            return recipe, []
        if stage == "closed-form":
            return self._closed_form(recipe, texts, folder)
        if stage == "layerwise":
            return self._layerwise(recipe, texts, folder)
        return end_to_end.train(
            recipe,
            self.variants,
            Text.of(texts.train, texts.held_out),
            TeacherSource(
                load=lambda: self._whole_teacher(recipe),
                sha256=self.teacher_sha256,
                cache=cache_folder() / "teachers",
            ),
            settings=self.end_to_end,
            folder=folder,
            device=self.placement.device,
            progress=self.progress,
        )

    def _closed_form(self, recipe: Recipe, texts: Texts, folder: Path) -> tuple[Recipe, list[dict[str, Any]]]:
        room, settings, resident = self.placement.room(self.run), self.closed_form, self.resident
        points = starts(recipe, self.base.architecture)
        batches = Batches(texts.fit, resident.device, progress=self.progress)
        keep = len(points) > 1 and has_room(resident, batches, room)
        with TeacherStates(resident, batches, keep=keep, room=room, progress=self.progress) as teacher:
            if len(points) == 1:  # whether it is taken is decided after every stage
                return closed_form.fit(recipe, teacher, settings=settings, room=room, progress=self.progress)
            best = best_fit(
                points, teacher, texts.held_out, settings=settings, folder=folder, room=room, progress=self.progress
            )
        return best.recipe, best.fits

    def _layerwise(self, recipe: Recipe, texts: Texts, folder: Path) -> tuple[Recipe, list[dict[str, Any]]]:
        return layerwise.train(
            recipe,
            self.resident,
            Text.of(texts.train, texts.held_out),
            settings=self.layerwise,
            teacher=self.teaching,
            folder=folder,
            memory_bytes=self.placement.memory_bytes,
            progress=self.progress,
        )

    def _whole_teacher(self, recipe: Recipe) -> Teacher:
        # The first process has the original in memory already.
        checkpoint = self.teacher or self.base
        model = (
            self.teaching.model
            if launch.rank() == 0
            else load_model(checkpoint, device=self.placement.device, dtype=self.placement.dtype)
        )
        return Teacher(model, checkpoint.architecture, lesson_depths(recipe, self.end_to_end))
