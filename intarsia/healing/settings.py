"""What the settings of heal stages share; those of trainings are checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from intarsia.architecture.spec import Part
from intarsia.errors import Problem, UserError

Layers: TypeAlias = Literal["spans", "after"]
"""Which output layers a stage changes. `spans`: those that stand for more than one original layer, or were merged;
`after`: these, and every layer after the first of them, which can correct what those before left."""

Weighting: TypeAlias = Literal["relative", "clip", "uniform"]
"""What a token counts in a squared error, see `intarsia.healing.losses`."""

Check: TypeAlias = tuple[str, str, object, bool]
"""A setting's name, what is expected, what was found, and whether it is right."""

RIDGES = tuple(10.0**exponent for exponent in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings:
    """How the closed form fits."""

    layers: Layers = "after"
    # Output projections to fit on layers that stand for more than themselves, in this order.
    changed: tuple[Part, ...] = ("mlp", "attention", "mlp")
    # Output projections to fit on the layers after them, in this order. All but the first only on as many layers, from
    # the front, as keep the cost of the fit within `closed_form.MOST_PASSES` of the model.
    unchanged: tuple[Part, ...] = ("mlp",)
    # `relative`: a token counts with 1 / |H^b|^2; `uniform`: all the same.
    weighting: Literal["relative", "uniform"] = "relative"
    # Every n-th sequence is held out, to choose the ridge strength by.
    held_out: int = 8
    # Strengths to choose from, relative to the feature scale, ascending.
    ridges: tuple[float, ...] = RIDGES


LAST = ClosedFormSettings(unchanged=("mlp", "attention"), held_out=32)
"""How the final model is fitted, where other text judges it: held-out sequences only choose the strength then, and few
are enough."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What both kinds of training share."""

    # How often every training sequence is seen.
    epochs: int = 1
    # Tokens of an optimiser step.
    batch_tokens: int = 2048
    # Peak of the learning rate; it warms up linearly and then falls along a cosine.
    lr: float = 3e-4
    # The last learning rate, as a share of the peak.
    least_lr: float = 0.05
    # Share of all steps in which the learning rate rises.
    warmup: float = 0.05
    # AdamW's decay of weights.
    weight_decay: float = 0.0
    # The gradient's norm is clipped to this.
    clip: float = 1.0
    # How often the held-out loss is measured, and state saved, on the way.
    evaluations: int = 10
    # Stop after this many measurements without a new best.
    patience: int = 3
    # Seed of everything random.
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            Problem(f"{name}: expected {expected}; found {found!r}.", "Give such a value, or leave the setting out.")
            for name, expected, found, right in self.checks()
            if not right
        ]
        if problems:
            raise UserError(problems)

    def checks(self) -> Iterable[Check]:
        """What must hold."""
        for name in ("epochs", "batch_tokens", "evaluations", "patience"):
            yield name, "a whole number, 1 or more", getattr(self, name), getattr(self, name) >= 1
        yield "lr", "a number above 0", self.lr, 0.0 < self.lr < float("inf")
        yield "clip", "a number above 0", self.clip, self.clip > 0.0
        yield "weight_decay", "a number, 0 or more", self.weight_decay, 0.0 <= self.weight_decay < float("inf")
        for name in ("least_lr", "warmup"):
            yield name, "a number from 0 to 1", getattr(self, name), 0.0 <= getattr(self, name) <= 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the run folder."""
        return asdict(self)


def weight_checks(settings: object, names: tuple[str, ...]) -> Iterable[Check]:
    """That weights of losses are none below 0, and one above."""
    found = {name: getattr(settings, name) for name in names}
    right = all(0.0 <= weight < float("inf") for weight in found.values()) and any(found.values())
    yield " + ".join(names), "weights of 0 or more, at least one of them above 0", found, right
