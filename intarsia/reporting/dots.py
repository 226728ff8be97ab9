"""Scores with their intervals, a row a model, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from intarsia.reporting.chart import Point, Series, marker
from intarsia.reporting.scale import Axis, fitted

_RIGHT, _TOP, _BOTTOM, _ROW, _LETTER = 14.0, 10.0, 40.0, 21.0, 6.0
_WIDTH = 460.0


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A row: a value and the interval that holds 95 % of what it may be."""

    name: str
    value: float
    low: float
    high: float
    hue: int
    hollow: bool = False


def dots_svg(rows: Sequence[Scored], *, axis: Axis, title: str, rules: Sequence[tuple[float, str]] = ()) -> str:
    """A dot and its interval for every row; `rules` are values with a name to compare with."""
    left = min(190.0, 14 + _LETTER * max(len(row.name) for row in rows))
    ends = [end for row in rows for end in (row.low, row.high)] + [value for value, _ in rules]
    across = fitted(axis, ends, left, _WIDTH - _RIGHT)
    bottom = _TOP + (12 if rules else 0) + len(rows) * _ROW
    parts = []
    for value, text in across.ticks():
        x = across.at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP:.0f}V{bottom:.0f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15:.0f}" text-anchor="middle">{escape(text)}</text>')
    for value, name in rules:
        x = across.at(value)
        anchor = "end" if x > _WIDTH * 0.8 else "start" if x < left + 30 else "middle"
        parts.append(f'<path class="rule" d="M{x:.1f} {_TOP + 4:.0f}V{bottom:.0f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_TOP:.0f}" text-anchor="{anchor}">{escape(name)}</text>')
    for index, row in enumerate(rows):
        y = bottom - (len(rows) - index - 0.5) * _ROW
        looks = Series(name=row.name, points=[Point(x=0, y=0)], hue=row.hue, dashed=row.hollow)
        said = f"{row.name}: {row.value:.4g}, 95 % interval {row.low:.4g} to {row.high:.4g}"
        parts.append(
            f"<g><title>{escape(said)}</title>"
            f'<text class="tick" x="{left - 8:.0f}" y="{y + 3.5:.1f}" text-anchor="end">{escape(row.name)}</text>'
            f'<path class="error s{row.hue % 12}" d="M{across.at(row.low):.1f} {y:.1f}H{across.at(row.high):.1f}"/>'
            f"{marker(looks, across.at(row.value), y)}</g>"
        )
    place = f'x="{(left + _WIDTH - _RIGHT) / 2:.0f}" y="{bottom + 33:.0f}" text-anchor="middle"'
    parts.append(f'<text class="name" {place}>{escape(axis.label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {bottom + _BOTTOM:.0f}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
