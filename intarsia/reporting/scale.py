"""Where a value lies on an axis, which values get a tick, and how a tick is written. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
# Digits of the ticks of a logarithmic axis: the first choice that gives enough of them.
_LOG_DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
_FEWEST = 4
_MOST_NAMED = 12


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis: its label, whether it is logarithmic or runs downwards, and how its ticks are written.

    `whole`: only whole numbers get a tick. `zero`: the axis begins at zero. `only`: the values that get a tick, where
    they are few enough to be named. `most`: where the axis ends at the latest; what is beyond is drawn there, with an
    arrow.
    """

    label: str
    log: bool = False
    falling: bool = False
    whole: bool = False
    zero: bool = False
    write: Callable[[float], str] | None = None
    only: tuple[float, ...] = ()
    most: float | None = None

    def beyond(self, value: float) -> bool:
        """Whether a value is past the end."""
        return self.most is not None and value > self.most


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis laid over `start` .. `stop` (pixels), for values between `low` and `high`."""

    axis: Axis
    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log(each) if self.axis.log else each for each in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + (1 - share if self.axis.falling else share) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Values that get a tick, and what is written at them."""
        values = list(self.axis.only)
        if not values:
            values = log_ticks(self.low, self.high) if self.axis.log else self._even()
        return [(value, (self.axis.write or short)(value)) for value in values]

    def _even(self) -> list[float]:
        return ticks(self.low, self.high, whole=self.axis.whole)


def layers_axis(depths: Iterable[float]) -> Axis:
    """Depths from the deepest to the shallowest, each with a tick where they are few."""
    found = tuple(sorted(set(depths)))
    return Axis(label="layers", whole=True, falling=True, only=found if len(found) <= _MOST_NAMED else ())


def fitted(axis: Axis, values: list[float], start: float, stop: float, *, room: float = 0.05) -> Scale:
    """The scale that shows all of some values, with a little room on both sides."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if axis.zero:
        low = min(low, 0.0)
    if axis.log:
        spread = math.log(high / low) or 0.2
        low, high = low * math.exp(-spread * room), high * math.exp(spread * room)
    else:
        spread = high - low or abs(high) or 1.0
        low, high = (low if axis.zero and low == 0 else low - spread * room), high + spread * room
    return Scale(axis=axis, low=low, high=high, start=start, stop=stop)


def ticks(low: float, high: float, *, about: int = 5, whole: bool = False) -> list[float]:
    """Round values between two, evenly spaced, `about` so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in _STEPS if power * digit >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two positive ones, such as 1, 2, 5, 10, 20; even ones where the two are close."""
    for digits in _LOG_DIGITS:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= _FEWEST:
            thin = math.ceil(len(found) / 8)
            return [round(value, 12) for value in found[::thin]]
    return ticks(low, high)


def short(value: float) -> str:
    """A number in few characters: 134.5M, 1.2k, 29.5, 0.034."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"
