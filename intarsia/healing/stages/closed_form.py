"""The stage `closed-form`: fit output projections by least squares; nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from intarsia.architecture.spec import Architecture, Part
from intarsia.flags import flag, token_count
from intarsia.healing.settings import ClosedFormSettings
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe


_TRIAL = 0.25
"""The share of the text that several starts are tried on."""


@dataclass(frozen=True, kw_only=True)
class FinalFitSettings(ClosedFormSettings):
    """How the closed form fits the final model. Acceptance uses other text, so few held-out sequences suffice."""

    # Output projections to fit on the layers after the changed ones, in this order. The first is fitted on all of
    # them, the others on as many as keep the fit within three passes of the model.
    unchanged: tuple[Part, ...] = flag(("mlp", "attention"), "--fit-unchanged")
    # Every n-th sequence chooses the ridge strength.
    held_out: int = flag(32, "--fit-held-out")
    # Most tokens of the calibration text to fit on.
    tokens: int = flag(131_072, "--fit-tokens", metavar="N", parse=token_count)
    # Tokens for choosing among several recipes to start from: each is fitted on this many (default: a quarter).
    trial_tokens: int | None = flag(None, "--fit-trial-tokens", metavar="N", parse=token_count)

    def passes_at_most(self, architecture: Architecture, *, starts: int, tokens: int) -> float:
        """Passes of the whole model over a text of `tokens` tokens that a fit from a number of starts takes."""
        from intarsia.healing.closed_form import fit_passes_at_most

        share = _TRIAL if self.trial_tokens is None else min(1.0, self.trial_tokens / min(tokens, self.tokens))
        fits = 1.0 if starts == 1 else starts * share + (share < 1.0)
        return fits * fit_passes_at_most(architecture) * min(1.0, self.tokens / tokens)


@heal_stage("closed-form", settings=FinalFitSettings, paper="2505.02819")
def closed_form(context: HealContext, recipe: Recipe, settings: FinalFitSettings) -> Recipe:
    """Fit output projections by least squares toward the original's hidden states.

    Of several starting points, each is fitted on a few tokens; the one nearest to the original on the selection text
    is then fitted on all.
    """
    from intarsia.healing.closed_form import AS_IT_IS, fit, fit_each, fit_forwards, starts
    from intarsia.healing.ridge import USUAL
    from intarsia.progress import current

    architecture = context.variants[recipe.base].architecture
    text = context.calibration.first(settings.tokens)
    common: dict[str, Any] = {"memory_budget": context.memory_budget}
    points, forwards = [*starts(recipe, architecture), *context.starts], 0.0
    start, found, fits = points[0], None, []
    trial = text if len(points) == 1 else text.first(settings.trial_tokens or int(text.tokens * _TRIAL))
    # A cheaper fit ranks the starts: one projection of each unchanged layer, at the usual ridge strength.
    trying = settings if trial is text else replace(settings, unchanged=settings.unchanged[:1], ridges=(USUAL,))
    units = (len(points) > 1) * len(points) * len(trial) / len(text) / 2  # a trial costs half
    with current().task("", units + 1.0):
        if len(points) > 1:
            with context.original_states(trial, fits=len(points)) as teacher, current().task("", 1.0, units=units):
                ranked = fit_each(points, teacher, context.held_out, settings=trying, folder=context.folder, **common)
            start = ranked[0].start
            context.facts |= {"starts": {each.start.name: each.divergence for each in ranked}, "start": start.name}
            context.facts["from_scratch"] = start.name != AS_IT_IS
            tried = sum(fit_forwards(each.recipe, trying, architecture) for each in points)
            forwards = tried * len(trial) / len(text)
            if trial is text:
                found, fits = ranked[0].recipe, ranked[0].fits
        if found is None:  # whether it is accepted is decided after the stage
            with context.original_states(text) as teacher:
                found, fits = fit(start.recipe, teacher, settings=settings, **common)
            forwards += fit_forwards(start.recipe, settings, architecture)
    context.details += fits
    context.facts |= {"tokens": text.tokens, "forwards": forwards}
    return found
