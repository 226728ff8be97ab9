"""What heal stages share: settings, which are checked when they are made, and the output layers that they change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_origin

from intarsia.architecture.spec import Part
from intarsia.errors import Problems
from intarsia.flags import flag, options_of
from intarsia.recipe.recipe import Op, Recipe, Select, Span

Layers: TypeAlias = Literal["spans", "after"]
"""Which output layers a stage changes. `spans`: those with a span of several original layers, or merged ones; `after`:
these, and every layer after the first of them, which can correct the errors before it."""

Weighting: TypeAlias = Literal["relative", "clip", "uniform"]
"""The weight of a token in a squared error; see `intarsia.healing.losses`."""

Check: TypeAlias = tuple[bool, tuple[str, ...], str]
"""Whether a condition on settings holds, their names, and the expected value."""

RIDGES = tuple(10.0**exponent for exponent in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Settings that are checked when they are made."""

    def __post_init__(self) -> None:
        options, problems = {option.attribute: option for option in options_of(type(self))}, Problems()
        for right, names, expected in self.checks():
            if not right:
                flags = " + ".join(f"--{options[name].key}" for name in names)
                values = " + ".join(str(getattr(self, name)) for name in names)
                problems.add(
                    f"{flags} is {values}; it must be {expected}.", "Give such a value, or leave the option out."
                )
        for option in options.values():
            if get_origin(option.kind) is Literal:  # the type of other values says enough
                with problems:
                    option.convert(getattr(self, option.attribute))
        problems.raise_any()

    def checks(self) -> Iterator[Check]:
        """What must hold."""
        return iter(())

    def at_least(self, least: int, *names: str) -> Iterator[Check]:
        """Require whole numbers of at least `least`; None counts as not given."""
        for name in names:
            value = getattr(self, name)
            yield value is None or value >= least, (name,), f"a whole number, {least} or more"


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings:
    """How the closed form fits."""

    # Layers to fit: `spans`, the changed ones; or `after`, also every layer after the first changed one.
    layers: Layers = flag("after", "--fit-layers")
    # Output projections to fit on changed layers, in this order.
    changed: tuple[Part, ...] = flag(("mlp", "attention", "mlp"), "--fit-changed")
    # Output projections to fit on the layers after them, in this order. The first is fitted on all of these layers, the
    # others on as many of the first layers as keep the fit within three passes of the model.
    unchanged: tuple[Part, ...] = flag(("mlp",), "--fit-unchanged")
    # Weight of a token in a fit: `relative`, less where its hidden state is large; or `uniform`.
    weighting: Literal["relative", "uniform"] = flag("relative", "--fit-weighting")
    # Every n-th sequence chooses the ridge strength.
    held_out: int = flag(8, "--fit-held-out")
    # Ridge strengths to choose from, relative to the feature scale, ascending.
    ridges: tuple[float, ...] = RIDGES


@dataclass(frozen=True, kw_only=True)
class Pace(Checked):
    """What both kinds of training share."""

    # Passes over the training text.
    epochs: int = 1
    # Tokens of an optimiser step.
    batch_tokens: int = 2048
    # Peak of the learning rate; it warms up linearly and then falls along a cosine.
    lr: float | None = None
    # Final learning rate, as a share of the peak.
    least_lr: float = 0.05
    # Share of all steps for warm-up of the learning rate.
    warmup: float = 0.05
    # Weight decay of AdamW.
    weight_decay: float = 0.0
    # Largest gradient norm; larger gradients are clipped.
    clip: float = 1.0
    # Number of times to measure the held-out loss and save the state.
    evaluations: int = 10
    # Stop after N measurements without a new best. The first steps often raise the loss (dev/LOG.md).
    patience: int = 10
    # Seed of everything random.
    seed: int = 0
    # Tokens that losses count on: `all`, or those of the `assistant`, which needs a chat template.
    loss_on: Literal["all", "assistant"] = "all"

    @property
    def peak(self) -> float:
        """Peak of the learning rate."""
        return 1e-3 if self.lr is None else self.lr

    def checks(self) -> Iterator[Check]:
        yield from self.at_least(1, "epochs", "batch_tokens", "evaluations", "patience")
        for name, value in (("lr", self.peak), ("clip", self.clip)):
            yield 0.0 < value < math.inf, (name,), "a number above 0"
        yield 0.0 <= self.weight_decay < math.inf, ("weight_decay",), "a number, 0 or more"
        for name in ("least_lr", "warmup"):
            yield 0.0 <= getattr(self, name) <= 1.0, (name,), "a number from 0 to 1"

    def weights(self, *names: str) -> Check:
        """Require loss weights of at least 0, one of them above 0."""
        found = [getattr(self, name) for name in names]
        right = all(0.0 <= weight < math.inf for weight in found) and any(found)
        return right, names, "weights of 0 or more, at least one of them above 0"


def trainable(op: Op, span: Span) -> bool:
    """Whether an output layer has something to learn: its span is several layers, or it is not an unchanged original.

    A layer with an empty span has no target.
    """
    start, stop = span
    return stop - start > 1 or (stop > start and not isinstance(op, Select))


def changed_layers(recipe: Recipe) -> list[int]:
    """The output layers that have something to learn."""
    layers = zip(recipe.layers, recipe.spans, strict=True)
    return [index for index, (op, span) in enumerate(layers) if trainable(op, span)]


def taught(recipe: Recipe, layers: Layers) -> list[int]:
    """Output layers that a heal stage changes. A layer with an empty span has no target."""
    changed = changed_layers(recipe)
    if layers == "after" and changed:
        after = range(changed[0], len(recipe.spans))
        return [index for index in after if recipe.spans[index][1] > recipe.spans[index][0]]
    return changed
