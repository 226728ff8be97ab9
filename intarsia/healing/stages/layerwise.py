"""The stage `layerwise`: each changed layer is trained toward the original's hidden states of its span."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.healing.settings import LayerwiseSettings
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe


@heal_stage("layerwise", settings=LayerwiseSettings, paper="2510.15304")
def layerwise(context: HealContext, recipe: Recipe, settings: LayerwiseSettings) -> Recipe:
    """Train each changed layer toward the original's hidden states."""
    from intarsia import progress
    from intarsia.healing.layerwise import train
    from intarsia.healing.training import Text

    found, reports = train(
        recipe,
        context.resident,
        Text.of(context.training, context.held_out),
        settings=settings,
        teacher=context.teaching,
        folder=context.folder,
        memory_bytes=context.memory_bytes,
        progress=progress.current(),
    )
    context.details += reports
    return found
