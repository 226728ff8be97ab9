"""The stage `layerwise`: train each changed layer toward the original's hidden states after its span."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from intarsia.flags import flag, token_count
from intarsia.healing.settings import Check, Layers, Pace, Weighting
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from intarsia.architecture.spec import Architecture
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class LayerwiseSettings(Pace):
    """How single layers are trained. The defaults were measured as best (dev/LOG.md, "which settings"); published is
    inputs="teacher", kl=1, mse=0."""

    # Peak of the learning rate.
    lr: float | None = flag(1e-3, "--layer-lr")
    # Tokens of an optimiser step.
    batch_tokens: int = flag(2048, "--layer-batch-tokens", metavar="N", parse=token_count)
    # Weight of the KL between softmaxed hidden states, the only loss of the paper.
    kl: float = flag(0.0, "--layer-kl")
    # Weight of the squared error of hidden states.
    mse: float = flag(1.0, "--layer-mse")
    # Weight of 1 - cosine of hidden states.
    cosine: float = flag(0.0, "--layer-cosine")
    # Weight of a token in the squared error.
    weighting: Weighting = "relative"
    # Inputs of a layer: hidden states of the `student`, so that it learns to correct the errors of the layers trained
    # before it; or of the `teacher`, as published, so that layers are independent of each other.
    inputs: Literal["student", "teacher"] = flag("student", "--layer-inputs")
    # Layers to train: `spans`, the changed ones; or `after`, also every layer after the first changed one.
    layers: Layers = flag("spans", "--train-layers")
    # Tensors or modules of a layer to train (`down_proj`, `mlp`, ...); empty for all.
    only: tuple[str, ...] = ()

    def passes_at_most(self, architecture: Architecture, *, starts: int, tokens: int) -> float:
        """Passes of the whole model over a text: the teacher's, the student's, and every layer forward and back."""
        return 2.0 + 3.0 * self.epochs

    def checks(self) -> Iterator[Check]:
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
