"""Line and point charts as SVG: text stays text, and every colour is a class.

Inside a page the page's style sheet colours them, so that they follow its light or dark scheme; `standalone` puts the
same style sheet into the picture, for a file of its own. Written by hand instead of with a plotting library: the page
needs nothing but what stands in it, and a reader of the code sees the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from importlib.resources import files

from intarsia.reporting.scale import Axis, Scale, fitted

HUES = 12
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 12.0, 14.0, 42.0
_LEGEND_ROW = 17.0
_LETTER = 5.9  # mean width of a letter at the font size of the legend
_MARKERS = ("circle", "square", "diamond", "triangle")
_CORNERS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
    "triangle": ((0.0, -1.2), (1.2, 0.9), (-1.2, 0.9)),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured value, with its standard error and a sentence that is shown when it is pointed at.

    `beyond`: the value is past the end of the axis, where it is drawn.
    """

    x: float
    y: float
    error: float | None = None
    title: str = ""
    beyond: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind. `hue` chooses colour and marker; `dashed` ones have hollow markers.

    `sign`: a marker of its own. `listed`: whether the legend names it; one that differs from another by being dashed
    alone need not be.
    """

    name: str
    points: Sequence[Point]
    hue: int
    dashed: bool = False
    line: bool = True
    dots: bool = True
    listed: bool = True
    sign: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A horizontal line to compare with."""

    y: float
    name: str


@cache
def style() -> str:
    """The style sheet of every chart."""
    return (files("intarsia.reporting") / "templates" / "chart.css").read_text(encoding="utf-8")


def standalone(svg: str) -> str:
    """An SVG file of its own from a picture made for a page."""
    head, _, rest = svg.partition(">")
    return f'{head} class="alone"><style>{style()}</style>{rest}\n'


def chart(
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    title: str,
    rules: Sequence[Rule] = (),
    note: str = "",
    width: float = 460.0,
    height: float = 300.0,
) -> str:
    """The chart as an `<svg>` element. Series without points are left out.

    Args:
        rules: horizontal lines to compare with.
        note: a line below the legend.
    """
    shown = [_within(each, y) for each in series if each.points]
    legend, rows = _legend([each for each in shown if each.listed], width)
    if note:
        legend += f'<text class="tick" x="8" y="{13.6 + rows * _LEGEND_ROW:.1f}">{escape(note)}</text>'
        rows += 1
    points = [point for each in shown for point in each.points]
    across = fitted(x, [point.x for point in points], _LEFT, width - _RIGHT, room=0.04)
    reach = [edge for point in points for edge in _reach(point, y)] + [rule.y for rule in rules]
    up = fitted(y, reach, height - _BOTTOM, _TOP)
    parts = [
        _grid(across, up, width, height),
        *(_rule(rule, up, width) for rule in rules),
        *(_series(each, across, up) for each in shown),
        f'<g transform="translate(0 {height + 4:.0f})">{legend}</g>' if rows else "",
    ]
    tall = height + rows * _LEGEND_ROW + (4 if rows else 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {tall:.0f}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _within(series: Series, axis: Axis) -> Series:
    """A series with what is beyond the axis at its end."""
    points = [
        replace(point, y=axis.most or 0.0, error=None, beyond=True) if axis.beyond(point.y) else point
        for point in series.points
    ]
    return replace(series, points=points)


def _reach(point: Point, axis: Axis) -> list[float]:
    ends = [point.y] if point.error is None else [point.y - point.error, point.y + point.error]
    return [end for end in ends if not axis.log or end > 0] or [point.y]


def _grid(across: Scale, up: Scale, width: float, height: float) -> str:
    parts = []
    bottom = height - _BOTTOM
    for value, text in up.ticks():
        y = up.at(value)
        parts.append(f'<path class="grid" d="M{_LEFT:.0f} {y:.1f}H{width - _RIGHT:.0f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6:.0f}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    for value, text in across.ticks():
        x = across.at(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom:.0f}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16:.0f}" text-anchor="middle">{escape(text)}</text>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<path class="axis" d="M{_LEFT:.0f} {bottom:.0f}H{width - _RIGHT:.0f}"/>')
    place = f'x="{middle:.0f}" y="{height - 8:.0f}" text-anchor="middle"'
    parts.append(f'<text class="name" {place}>{escape(across.axis.label)}</text>')
    turned = f'text-anchor="middle" transform="translate(11 {(bottom + _TOP) / 2:.0f}) rotate(-90)"'
    parts.append(f'<text class="name" {turned}>{escape(up.axis.label)}</text>')
    return "".join(parts)


def _rule(rule: Rule, up: Scale, width: float) -> str:
    y = up.at(rule.y)
    return (
        f'<path class="rule" d="M{_LEFT:.0f} {y:.1f}H{width - _RIGHT:.0f}"/>'
        f'<text class="tick" x="{_LEFT + 4:.0f}" y="{y - 4:.1f}">{escape(rule.name)}</text>'
    )


def _series(series: Series, across: Scale, up: Scale) -> str:
    kind = f"s{series.hue % HUES}"
    places = sorted((across.at(point.x), up.at(point.y), point) for point in series.points)
    parts = []
    if series.line and len(places) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        parts.append(f'<path class="line {kind}{" dashed" if series.dashed else ""}" d="M{path}"/>')
    for x, y, point in places:
        if point.error:
            low, high = (up.at(edge) for edge in (_reach(point, up.axis)[0], _reach(point, up.axis)[-1]))
            parts.append(f'<path class="error {kind}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        if series.dots:
            said = f"<title>{escape(point.title)}</title>" if point.title else ""
            arrow = (
                f'<text class="tick" x="{x:.1f}" y="{y - 5:.1f}" text-anchor="middle">↑</text>' if point.beyond else ""
            )
            parts.append(f"<g>{said}{marker(series, x, y)}{arrow}</g>")
    return "".join(parts)


def marker(series: Series, x: float, y: float, size: float = 3.6) -> str:
    """The sign of a series at a place."""
    kind = f'class="dot s{series.hue % HUES}{" hollow" if series.dashed else ""}"'
    shape = series.sign or _MARKERS[series.hue % len(_MARKERS)]
    if shape == "circle":
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    corners = [(x + size * along, y + size * down) for along, down in _CORNERS[shape]]
    return f'<path {kind} d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in corners)}Z"/>'


def _legend(series: Sequence[Series], width: float) -> tuple[str, int]:
    """Entries of equal width in as many columns as fit, and the number of rows; nothing for a single series."""
    if len(series) < 2:
        return "", 0
    entry = 34 + _LETTER * max(len(each.name) for each in series)
    columns = max(1, int((width - 16) // entry))
    parts = []
    for index, each in enumerate(series):
        x, y = 8 + (index % columns) * entry, 10 + (index // columns) * _LEGEND_ROW
        if each.line:
            dashed = " dashed" if each.dashed else ""
            parts.append(f'<path class="line s{each.hue % HUES}{dashed}" d="M{x:.1f} {y:.1f}h20"/>')
        if each.dots:
            parts.append(marker(each, x + 10, y))
        parts.append(f'<text class="tick" x="{x + 25:.1f}" y="{y + 3.6:.1f}">{escape(each.name)}</text>')
    return "".join(parts), -(-len(series) // columns)
