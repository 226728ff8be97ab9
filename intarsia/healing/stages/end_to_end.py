"""The stage `end-to-end`: the whole model is trained toward the original, in every launched process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.errors import UserError, missing_package
from intarsia.healing.settings import EndToEndSettings
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe


def check(settings: EndToEndSettings) -> None:
    """Check that Accelerate is installed, and knows the tracker.

    Raises:
        UserError: it is not, or does not.
    """
    try:
        from accelerate.tracking import get_available_trackers
    except ImportError as error:
        raise missing_package("accelerate", where="end-to-end training", extra="train", error=error) from error
    known = [str(tracker) for tracker in get_available_trackers()]
    if settings.log is not None and settings.log not in known:
        raise UserError(
            f"--log {settings.log} is no tracker whose package is installed.",
            f"Installed are: {', '.join(known) or 'none'}.",
        )


@heal_stage("end-to-end", settings=EndToEndSettings, whole_model=True, check=check, paper="2510.15304")
def end_to_end(context: HealContext, recipe: Recipe, settings: EndToEndSettings) -> Recipe:
    """Train the whole model toward the original: next tokens, and hidden states where that is asked for."""
    from intarsia import progress
    from intarsia.checkpoint.hashing import cache_folder, scan
    from intarsia.healing.end_to_end import lesson_depths, train
    from intarsia.healing.teacher import Teacher, TeacherSource
    from intarsia.healing.training import Text

    checkpoint = context.teacher or context.variants[recipe.base]
    teacher = TeacherSource(
        load=lambda: Teacher(context.teaching.model, checkpoint.architecture, lesson_depths(recipe, settings)),
        sha256=scan(checkpoint, progress.current()),
        cache=cache_folder() / "teachers",
    )
    found, reports = train(
        recipe,
        context.variants,
        Text.of(context.training, context.held_out),
        teacher,
        settings=settings,
        folder=context.folder,
        device=context.device,
        progress=progress.current(),
    )
    context.details += reports
    return found
