"""The stage `closed-form`: output projections are fitted by least squares; nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from intarsia.architecture.spec import Architecture, Part
from intarsia.flags import flag, token_count
from intarsia.healing.settings import LAST, ClosedFormSettings, Layers
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class FinalFitSettings(ClosedFormSettings):
    """How the closed form fits the final model: other text judges it, so few held-out sequences are enough."""

    # Layers that are fitted: those that were changed, or also every layer after the first of them.
    layers: Layers = flag(LAST.layers, "--fit-layers")
    # Output projections that are fitted on changed layers, in this order.
    changed: tuple[Part, ...] = flag(LAST.changed, "--fit-changed")
    # Output projections that are fitted on the others; all but the first only while the fit costs little.
    unchanged: tuple[Part, ...] = flag(LAST.unchanged, "--fit-unchanged")
    # What a token counts in a fit: less where its hidden state is large, or all the same.
    weighting: Literal["relative", "uniform"] = flag(LAST.weighting, "--fit-weighting")
    # Every n-th sequence chooses the ridge strength.
    held_out: int = flag(LAST.held_out, "--fit-held-out")
    # Tokens of the calibration text that it uses at most.
    tokens: int = flag(131_072, "--fit-tokens", metavar="N", parse=token_count)

    def passes_at_most(self, architecture: Architecture) -> int:
        """Passes of the whole model over the text that one fit takes."""
        from intarsia.healing.layer_map import fit_passes_at_most

        return fit_passes_at_most(architecture)


@heal_stage("closed-form", settings=FinalFitSettings, paper="2505.02819")
def closed_form(context: HealContext, recipe: Recipe, settings: FinalFitSettings) -> Recipe:
    """Fit output projections by least squares toward the original's hidden states.

    Of several starting points, the one is taken that ends with the lowest perplexity on the selection text.
    """
    from intarsia import progress
    from intarsia.healing.closed_form import fit
    from intarsia.healing.layer_map import fit_forwards
    from intarsia.healing.restarts import AS_IT_IS, best_fit, starts

    text, architecture = context.calibration, context.variants[recipe.base].architecture
    sequences = max(1, settings.tokens // text.seq_len)
    text = text.take(sequences) if sequences < len(text) else text
    points = [*starts(recipe, architecture), *context.starts]
    with context.original_states(text, fits=len(points)) as teacher:
        if len(points) == 1:  # whether it is taken is decided after the stage
            found, fits = fit(
                recipe,
                teacher,
                settings=settings,
                unseen=context.unseen,
                room=context.room,
                progress=progress.current(),
            )
        else:
            best = best_fit(
                points,
                teacher,
                context.held_out,
                settings=settings,
                folder=context.folder,
                unseen=context.unseen,
                room=context.room,
                progress=progress.current(),
            )
            found, fits = best.recipe, best.fits
            context.facts |= {"starts": best.perplexities, "start": best.start.name}
            context.facts["from_scratch"] = best.start.name != AS_IT_IS
    context.details += fits
    context.facts["tokens"] = text.tokens
    context.facts["forwards"] = sum(fit_forwards(point.recipe, settings, architecture) for point in points)
    return found
