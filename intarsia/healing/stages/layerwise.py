"""The stage `layerwise`: each changed layer is trained toward the original's hidden states of its span."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from intarsia.flags import flag, token_count
from intarsia.healing.settings import Check, Layers, Pace, Weighting
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class LayerwiseSettings(Pace):
    """How single layers are trained. The defaults are what was measured as best (dev/LOG.md, "which settings"); as
    published it is inputs="teacher", kl=1, mse=0."""

    # Peak of the learning rate.
    lr: float | None = flag(1e-3, "--layer-lr")
    # Tokens of an optimiser step.
    batch_tokens: int = flag(2048, "--layer-batch-tokens", metavar="N", parse=token_count)
    # Weight of the KL between softmaxed hidden states; alone it is as published.
    kl: float = flag(0.0, "--layer-kl")
    # Weight of the squared error of hidden states.
    mse: float = flag(1.0, "--layer-mse")
    # Weight of 1 - cosine of hidden states.
    cosine: float = flag(0.0, "--layer-cosine")
    # What a token counts in the squared error.
    weighting: Weighting = "relative"
    # Inputs of a layer: hidden states of the `student`, from the layers trained before it, so that it learns to correct
    # what they left; or of the `teacher`, as published, so that layers are independent of each other.
    inputs: Literal["student", "teacher"] = flag("student", "--layer-inputs")
    # Layers that are trained: those that were changed, or also every layer after the first of them.
    layers: Layers = flag("spans", "--train-layers")
    # Names of tensors or modules inside a layer (`down_proj`, `mlp`, ...) that are trained; empty for all.
    only: tuple[str, ...] = ()

    def checks(self) -> Iterator[Check]:
        """What must hold."""
        yield from super().checks()
        yield self.weights("kl", "mse", "cosine")


@heal_stage("layerwise", settings=LayerwiseSettings, paper="2510.15304")
def layerwise(context: HealContext, recipe: Recipe, settings: LayerwiseSettings) -> Recipe:
    """Train each changed layer toward the original's hidden states."""
    from intarsia.healing.layerwise import train
    from intarsia.healing.training import Text

    found, reports = train(
        recipe,
        context.resident,
        Text.of(context.calibration, context.held_out, turns=context.turns(settings.loss_on)),
        settings=settings,
        teacher=context.teaching,
        folder=context.folder,
        memory_bytes=context.memory_bytes,
    )
    context.details += reports
    return found
