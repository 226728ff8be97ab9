"""What the closed form can be set to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from intarsia.anatomy.spec import Part
from intarsia.healing.correspond import Layers
from intarsia.healing.part_fit import FitRule

RIDGES = tuple(10.0**exponent for exponent in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings:
    """How the closed form fits.

    Attributes:
        layers: `spans`: output layers that stand for more than themselves or were merged; `behind`: these and every
            layer behind the first of them.
        changed: read-outs to fit on the former, in this order.
        unchanged: read-outs to fit on the latter, in this order. All but the first only on as many layers, from the
            front, as keep the cost of the fit within `MOST_PASSES` of the model (`fit_plan.fitted_parts`).
        weighting: `relative`: a token counts with 1 / |H^b|^2; `uniform`: all the same.
        held_out: every how-manieth sequence is held out to choose the ridge strength by.
        ridges: relative strengths to choose from.
    """

    layers: Layers = "behind"
    changed: tuple[Part, ...] = ("mlp", "attention", "mlp")
    unchanged: tuple[Part, ...] = ("mlp",)
    weighting: Literal["relative", "uniform"] = "relative"
    held_out: int = 8
    ridges: tuple[float, ...] = RIDGES

    @property
    def rule(self) -> FitRule:
        """What every read-out is fitted by."""
        return FitRule(weighting=self.weighting, held_out=self.held_out, ridges=self.ridges)


LAST = ClosedFormSettings(unchanged=("mlp", "attention"), held_out=32)
"""How a model is fitted once it is decided on, where text of its own judges: held-out sequences only choose the
strength then, and few will do."""
