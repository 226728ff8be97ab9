"""Charts as SVG, drawn by matplotlib: text stays text, and every colour is a CSS variable of the page.

matplotlib draws with one stand-in colour for each variable. The SVG is then adapted to a page with a strict content
security policy: no style attributes, no style sheet, no metadata, and the same bytes for the same values. A picture in
a separate file (`standalone`) has the light colours, with rules for a dark background.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from intarsia.reporting.wording import short

WOODS, HUES = 6, 12

PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#2b2520", "#ede5d9"),
    "soft": ("#6d665e", "#b3a899"),
    "rule": ("#8a7f72", "#8f8475"),
    "accent": ("#8f4a1d", "#e3a572"),
    # Woods of the puzzle picture: neighbours differ enough to distinguish pieces of adjacent layers.
    "w0": ("#d9a05b", "#dca766"),
    "w1": ("#7d4e27", "#9b6a3f"),
    "w2": ("#c4693a", "#d27c4b"),
    "w3": ("#4f3a2c", "#7a6250"),
    "w4": ("#e6c588", "#eed3a0"),
    "w5": ("#a4793f", "#b98f58"),
    # Series of a chart.
    "s0": ("#a63d1b", "#ef8157"),
    "s1": ("#1f6f78", "#58b8c2"),
    "s2": ("#b98a1d", "#e6bb55"),
    "s3": ("#5b4a9e", "#a797ec"),
    "s4": ("#5f8a3a", "#9bc873"),
    "s5": ("#b0487f", "#e58bbb"),
    "s6": ("#3f72b5", "#85b3ee"),
    "s7": ("#7d6a55", "#c0ab92"),
    "s8": ("#d07a3c", "#f2ab78"),
    "s9": ("#3c9a83", "#76cfb8"),
    "s10": ("#94792f", "#cdb268"),
    "s11": ("#8b8f96", "#b9bdc4"),
}


def variables() -> str:
    """The definition of every colour as a CSS variable."""
    light, dark = ("".join(f"--{name}:{pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def standalone(svg: Markup) -> str:
    """Return a picture of the page as an SVG file for programs without CSS variables."""
    text = re.sub(r"var\(--(\w+)\)", lambda found: PALETTE[found[1]][0], str(svg))
    dark = "".join(
        f'[{attribute}="{PALETTE[name][0]}"]{{{attribute}:{PALETTE[name][1]}}}'
        for attribute, name in sorted(set(re.findall(r'(fill|stroke)="var\(--(\w+)\)"', svg)))
    )
    head, _, rest = text.partition(">")
    return f"{head}><style>@media (prefers-color-scheme:dark){{{dark}}}</style>{rest}\n"


_WIDTH, _HEIGHT, _ROW = 400.0, 270.0, 17.0
_LETTER = 6.3  # mean width of a letter of the legend
_MARKERS = "osD^"
_STAND_IN = {name: f"#0a0b{number:02x}" for number, name in enumerate(PALETTE)}
_VARIABLE = {colour: f"var(--{name})" for name, colour in _STAND_IN.items()}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_DROPPED = {"font-family", "font", "stroke-miterlimit", "stroke-linejoin"}
_RC: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "intarsia",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": _STAND_IN["soft"],
    "axes.labelcolor": _STAND_IN["soft"],
    "axes.edgecolor": _STAND_IN["rule"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": _STAND_IN["rule"],
    "ytick.color": _STAND_IN["rule"],
    "xtick.labelcolor": _STAND_IN["soft"],
    "ytick.labelcolor": _STAND_IN["soft"],
    "ytick.left": False,
    "grid.color": _STAND_IN["rule"],
    "grid.alpha": 0.22,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "legend.labelspacing": 0.35,
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of a chart."""

    label: str
    log: bool = False
    # Whether it runs from large values to small ones.
    falling: bool = False
    # Whether only whole numbers get a tick.
    whole: bool = False
    # Whether it starts at zero.
    zero: bool = False
    # The values with a tick; none: chosen by the range.
    ticks: Sequence[float] = ()
    # Larger values are drawn at this one, with an arrow.
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured value, with its standard error and a tooltip."""

    x: float
    y: float
    error: float | None = None
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind. `hue` selects colour and marker; a dashed series has hollow markers."""

    name: str
    points: Sequence[Point]
    hue: int
    dashed: bool = False
    line: bool = True
    dots: bool = True
    # Whether it is in the legend.
    listed: bool = True
    # A matplotlib marker instead of that of its hue.
    marker: str | None = None


def layers_axis(depths: Iterable[float]) -> Axis:
    """Return an axis from the deepest model to the shallowest, with a tick for each depth if they are few."""
    found = tuple(sorted(set(depths)))
    return Axis(label="layers", whole=True, falling=True, ticks=found if len(found) <= 12 else ())


def chart(
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    title: str,
    rules: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Markup:
    """Draw lines and points. `rules` are named horizontal reference lines; `note` is a line above the legend."""
    shown = []
    for each in series:
        if finite := [point for point in each.points if math.isfinite(point.x) and math.isfinite(point.y)]:
            shown.append(replace(each, points=sorted(finite, key=lambda point: (point.x, point.y))))
    listed = [each for each in shown if each.listed]
    labels = [*(each.name for each in listed), *(name for _, name in rules)]
    # Leave room for the chart beside a long name.
    labels = [name if len(name) <= 54 else f"{name[:53]}…" for name in labels] if len(labels) > 1 else []
    columns = max(1, int((_WIDTH - 10) // (44 + _LETTER * max(map(len, labels), default=1))))
    rows = math.ceil(len(labels) / columns) + bool(note)
    with _figure(_HEIGHT + _ROW * rows) as (figure, axes):
        axes.grid(axis="y")
        drawn = {id(each): _series(axes, each, y, gid=f"series-{n}") for n, each in enumerate(shown)}
        handles = [drawn[id(each)] for each in listed]
        handles += [axes.axhline(value, color=_STAND_IN["rule"], linestyle=(0, (2, 3)), lw=1.2) for value, _ in rules]
        _lay_out(axes.xaxis, x, [point.x for each in shown for point in each.points])
        reach = [edge for each in shown for point in each.points for edge in _reach(point, y)]
        _lay_out(axes.yaxis, y, [*reach, *(value for value, _ in rules)])
        if rows:
            figure.legend(
                handles if labels else [],
                labels,
                loc="outside lower left",
                ncols=columns,
                title=note or None,
                title_fontsize=10.5,
                alignment="left",
                fontsize=10.5,
            )
        titles = {f"series-{n}": [point.title for point in each.points] for n, each in enumerate(shown) if each.dots}
        return _finished(figure, title, titles)


def heat(rows: Sequence[Sequence[float]], *, title: str, across: str, down: str = "layer") -> Markup:
    """Draw rows of values, the first one at the top; stronger colour means larger.

    Shades are ten steps of the logarithm, from the 2nd to the 98th percentile of all values.
    """
    values = sorted(value for row in rows for value in row if value > 0) or [1.0]
    low, high = (math.log(values[int(share * (len(values) - 1))]) for share in (0.02, 0.98))
    tall = min(13.0, max(4.0, 380.0 / max(1, len(rows))))
    with _figure(46 + tall * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            spans, colours, start = [], [], 0
            for shade, equal in groupby(_shade(value, low, high) for value in row):  # a map of 80 layers stays small
                spans.append((start, len(list(equal))))
                colours.append((_STAND_IN["accent"], shade))
                start += spans[-1][1]
            axes.broken_barh(spans, (place - 0.47, 0.94), facecolors=colours, lw=0)
        axes.set(xlim=(0, max(map(len, rows), default=1)), ylim=(len(rows) - 0.5, -0.5), xlabel=across, ylabel=down)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks(range(0, len(rows), math.ceil(13.0 / tall)))
        return _finished(figure, title, {})


def _series(axes: Any, series: Series, y: Axis, gid: str) -> Any:
    """Draw one series, with arrows for points beyond the axis."""
    colour, points = _STAND_IN[f"s{series.hue % HUES}"], series.points
    looks: dict[str, Any] = {}
    if series.dots:
        marker = series.marker or _MARKERS[series.hue % len(_MARKERS)]
        looks = {"marker": marker, "mec": colour, "mfc": "none" if series.dashed else colour, "mew": 1.3}
    for point in points:
        if point.error and not _beyond(point, y):
            axes.vlines(point.x, *_reach(point, y), color=colour, linewidth=1.2, alpha=0.6)
        if _beyond(point, y):
            axes.annotate("↑", (point.x, y.most), (0, 4), textcoords="offset points", ha="center")
    (line,) = axes.plot(
        [point.x for point in points],
        [y.most if _beyond(point, y) else point.y for point in points],
        linestyle=("none" if not series.line else (0, (3, 2)) if series.dashed else "solid"),
        color=colour,
        gid=gid,
        **looks,
    )
    return line


def _beyond(point: Point, axis: Axis) -> bool:
    return axis.most is not None and point.y > axis.most


def _reach(point: Point, axis: Axis) -> tuple[float, float]:
    """The extent of a point with its error; on a logarithmic axis it ends at the point."""
    if _beyond(point, axis):
        return axis.most or 0.0, axis.most or 0.0
    low, high = point.y - (point.error or 0.0), point.y + (point.error or 0.0)
    return (point.y if axis.log and low <= 0 else low), high


def _lay_out(drawn: Any, axis: Axis, values: Sequence[float]) -> None:
    """Set scale, limits and ticks of an axis, so that it covers all values."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=1.0), max(finite, default=2.0)
    if axis.log:
        getattr(drawn.axes, f"set_{drawn.axis_name}scale")("log")
        margin = 1.05 * max(high / low, 1.1) ** 0.04
        low, high, span = low / margin, high * margin, high / low
    else:
        margin = 0.05 * (high - low or abs(high) or 1.0)
        low, high, span = (min(low, 0.0) if axis.zero else low - margin), high + margin, 1.0
    getattr(drawn.axes, f"set_{drawn.axis_name}lim")(*((high, low) if axis.falling else (low, high)))
    digits = (1, 2, 3, 5, 7) if span < 20 else (1, 2, 5) if span < 100 else (1, 3) if span < 3000 else (1,)
    even = MaxNLocator(5, integer=axis.whole, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2)
    drawn.set_major_locator(FixedLocator(axis.ticks) if axis.ticks else LogLocator(10, digits) if span >= 8 else even)
    drawn.set_minor_locator(NullLocator())
    drawn.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    drawn.set_label_text(axis.label)


def _shade(value: float, low: float, high: float) -> float:
    share = 0.0 if value <= 0 else (math.log(value) - low) / (high - low) if high > low else 0.5
    return 0.04 + 0.96 * max(0, min(9, int(10 * share))) / 9


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Any]]:
    """An empty figure of the page's width, in its style. Fonts are the reader's, so missing glyphs do not matter."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        yield figure, axes


def _finished(figure: Any, title: str, titles: Mapping[str, Sequence[str]]) -> Markup:
    """Convert a figure to an `<svg>` element. `titles` are the tooltips of the markers of an artist, by its gid."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = dict(_attributes(element.attrib))
        if element.tag == "g":
            marks = [use for use in element.iter() if use.tag.removeprefix(_SVG) == "use"]
            for use, text in zip(marks, titles.get(element.attrib.pop("id", ""), ()), strict=False):
                if text:
                    ElementTree.SubElement(use, "title").text = text
        element.text, element.tail = (
            None if not (part or "").strip() else part for part in (element.text, element.tail)
        )
    root.attrib = {"xmlns": _SVG[1:-1], "viewBox": root.attrib["viewBox"], "class": "chart", "role": "img"}
    root.set("font-family", "system-ui, sans-serif")
    heading = ElementTree.Element("title")
    heading.text = title
    root.insert(0, heading)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attributes(given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Attributes with each part of a `style` as a separate attribute, stand-ins as variables, and shorter numbers."""
    for name, value in given.items():
        parts = (
            [part.split(":", 1) for part in value.split(";") if part.strip()] if name == "style" else [[name, value]]
        )
        for key, text in parts:
            key, text = key.strip().removeprefix(_LINK), text.strip()
            if key in _DROPPED or (key == "transform" and text.startswith("rotate(-0 ")):
                continue
            yield key, _VARIABLE.get(text) or re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
