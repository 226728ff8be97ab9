"""ShortGPT: remove the layers of least block influence, measured once on the whole model.

Source: Men et al., arXiv 2403.03853. No deviation: influence is measured on the residual stream, over all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.pruning.step import OneShot, PlanSettings
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


@planner("shortgpt", settings=PlanSettings, paper="2403.03853")
class ShortGpt(OneShot):
    """Drop the layers of least block influence."""

    scored = "influence"

    def __init__(self, settings: PlanSettings) -> None:
        self.blocks, self.plan_tokens, self.criterion = settings.blocks, settings.plan_tokens, settings.criterion

    def score(self, model: Intermediate) -> list[float]:
        """The influence of each layer."""
        return [measure.influence for measure in model.measures]
