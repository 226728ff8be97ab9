"""What the closed form can be set to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from intarsia.anatomy.spec import Part
from intarsia.healing.layer_map import Layers

RIDGES = tuple(10.0**exponent for exponent in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings:
    """How the closed form fits."""

    # `spans`: output layers that stand for more than one original layer, or were merged; `behind`: these, and every
    # layer after the first of them.
    layers: Layers = "behind"
    # Output projections to fit on the former, in this order.
    changed: tuple[Part, ...] = ("mlp", "attention", "mlp")
    # Output projections to fit on the layers after them, in this order. All but the first only on as many layers, from
    # the front, as keep the cost of the fit within `MOST_PASSES` of the model.
    unchanged: tuple[Part, ...] = ("mlp",)
    # `relative`: a token counts with 1 / |H^b|^2; `uniform`: all the same.
    weighting: Literal["relative", "uniform"] = "relative"
    # Every n-th sequence is held out, to choose the ridge strength by.
    held_out: int = 8
    # Relative strengths to choose from, ascending.
    ridges: tuple[float, ...] = RIDGES


LAST = ClosedFormSettings(unchanged=("mlp", "attention"), held_out=32)
"""How the final model is fitted, where text of its own judges it: held-out sequences only choose the strength then, and
few are enough."""
