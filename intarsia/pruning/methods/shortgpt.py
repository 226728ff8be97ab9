"""ShortGPT: remove the layers of least block influence, measured once on the whole model.

Source: Men et al., arXiv 2403.03853. No deviation: influence is measured on the residual stream, over all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.pruning.step import OneShot
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


@planner("shortgpt", paper="2403.03853")
class ShortGpt(OneShot):
    """Drop the layers of least block influence."""

    scored = "influence"

    def score(self, model: Intermediate) -> list[float]:
        """The influence of each layer."""
        return [measure.influence for measure in model.measures]
