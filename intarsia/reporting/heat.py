"""A heat map as SVG: rows of values, darker where they are larger, coloured by classes of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 34.0, 4.0, 16.0, 22.0
_WIDTH = 460.0
SHADES = 10


def heat_svg(rows: Sequence[Sequence[float]], *, title: str, across: str, of: str = "layer") -> str:
    """Rows of equal length, the first one at the top. Shades are steps of the logarithm, from the 2nd to the 98th
    hundredth of all values; a row's name is its number."""
    values = sorted(value for row in rows for value in row if value > 0) or [1.0]
    low, high = (math.log(values[int(share * (len(values) - 1))]) for share in (0.02, 0.98))
    columns = max((len(row) for row in rows), default=1)
    tall = min(14.0, max(4.0, 420.0 / max(1, len(rows))))
    wide = (_WIDTH - _LEFT - _RIGHT) / columns
    parts = [f'<text class="tick" x="0" y="11">{escape(of)}</text>']
    every = max(1, math.ceil(11.0 / tall))
    for index, row in enumerate(rows):
        y = _TOP + index * tall
        if index % every == 0:
            place = f'x="{_LEFT - 5:.0f}" y="{y + tall / 2 + 3.5:.1f}" text-anchor="end"'
            parts.append(f'<text class="tick" {place}>{index}</text>')
        parts += _runs(row, low, high, y, tall, wide)
    bottom = _TOP + len(rows) * tall
    place = f'x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{bottom + 15:.0f}" text-anchor="middle"'
    parts.append(f'<text class="name" {place}>{escape(across)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {bottom + _BOTTOM:.0f}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _runs(row: Sequence[float], low: float, high: float, y: float, tall: float, wide: float) -> list[str]:
    """One rectangle for neighbours of one shade: a map of 80 layers stays small."""
    shades = [_shade(value, low, high) for value in row]
    found, start = [], 0
    for index in range(1, len(shades) + 1):
        if index == len(shades) or shades[index] != shades[start]:
            x, length = _LEFT + start * wide, (index - start) * wide
            box = f'x="{x:.1f}" y="{y:.1f}" width="{length:.1f}" height="{tall - 0.6:.1f}"'
            found.append(f'<rect class="h{shades[start]}" {box}/>')
            start = index
    return found


def _shade(value: float, low: float, high: float) -> int:
    if value <= 0:
        return 0
    share = (math.log(value) - low) / (high - low) if high > low else 0.5
    return max(0, min(SHADES - 1, int(share * SHADES)))
