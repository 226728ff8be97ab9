"""Charts show the values that they are given, and are fit for a page with a strict policy."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from intarsia.reporting.figures import (
    PALETTE,
    Axis,
    Point,
    Series,
    chart,
    heat,
    layers_axis,
    standalone,
    variables,
)
from intarsia.reporting.wording import short

SVG = "{http://www.w3.org/2000/svg}"


def line(name: str, *values: float, **how: object) -> Series:
    points = [Point(x=index, y=value, error=0.1, title=f"{name} {index}") for index, value in enumerate(values)]
    return Series(name=name, points=points, hue=1, **how)


def drawn(*series: Series, **how: object) -> ElementTree.Element:
    given = {"x": Axis(label="x"), "y": Axis(label="y & z"), "title": "<t>", **how}
    return ElementTree.fromstring(chart(series, **given))


def texts(tree: ElementTree.Element) -> list[str]:
    return [str(element.text) for element in tree.iter(f"{SVG}text")]


def titles(tree: ElementTree.Element) -> list[str]:
    return [str(element.text) for element in tree.iter(f"{SVG}title")]


def places(tree: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where every marker with a tooltip is."""
    marks = [use for use in tree.iter(f"{SVG}use") if use.find(f"{SVG}title") is not None]
    return {str(use.findtext(f"{SVG}title")): (float(use.get("x")), float(use.get("y"))) for use in marks}


def errors(tree: ElementTree.Element) -> list[tuple[float, ...]]:
    """The coordinates of error bars and intervals."""
    bars = [path.get("d") for path in tree.iter(f"{SVG}path") if path.get("stroke-opacity") == "0.6"]
    return [tuple(map(float, re.findall(r"[\d.]+", bar))) for bar in bars]


def ticks(axis: Axis, *values: float) -> list[str]:
    """The texts of an axis."""
    found = texts(drawn(Series(name="", points=[Point(x=x, y=1.0) for x in values], hue=0), x=axis, y=Axis(label="")))
    return found[: found.index(axis.label)]


def test_every_point_and_its_words() -> None:
    tree = drawn(line("a", 1.0, 2.0, 4.0), line("b", 3.0, dashed=True))
    assert titles(tree) == ["<t>", "a 0", "a 1", "a 2", "b 0"]
    assert {"x", "y & z", "a", "b"} <= set(texts(tree))
    assert len(errors(tree)) == 4
    marks = [use for use in tree.iter(f"{SVG}use") if use.get("stroke") == "var(--s1)"]
    hollow = [use for use in marks if use.get("fill", "none") == "none"]
    assert (len(marks), len(hollow)) == (6, 2)  # each point, and the legend's


def test_values_are_where_they_belong() -> None:
    found = places(drawn(Series(name="a", points=[Point(x=0, y=1.0, title="p"), Point(x=1, y=5.0, title="q")], hue=0)))
    assert found["p"][0] < found["q"][0] and found["p"][1] > found["q"][1]
    for axis in (Axis(label="x", falling=True), layers_axis([1, 0])):
        turned = places(drawn(line("a", 1.0, 2.0), x=axis))
        assert turned["a 0"][0] > turned["a 1"][0]
    log = places(drawn(line("a", 1.0, 10.0, 100.0), y=Axis(label="y", log=True)))
    assert log["a 0"][1] - log["a 1"][1] == pytest.approx(log["a 1"][1] - log["a 2"][1], abs=0.1)


@pytest.mark.parametrize("values", [(1.0, 9.0), (5.0,), (3.0, 3.0)])
@pytest.mark.parametrize("how", [{}, {"log": True}, {"zero": True}])
def test_every_value_is_within_the_chart(values: tuple[float, ...], how: dict[str, bool]) -> None:
    tree = drawn(line("a", *values), y=Axis(label="y", **how))
    _, _, width, height = map(float, tree.get("viewBox").split())
    assert all(0 < x < width and 0 < y < height for x, y in places(tree).values())


def test_a_value_beyond_the_axis_is_drawn_at_its_end_with_an_arrow() -> None:
    points = [Point(x=0, y=20.0, error=1.0, title="in"), Point(x=1, y=3e7, error=2e6, title="three in ten million")]
    series, y = Series(name="a", points=points, hue=0), Axis(label="y", log=True, most=100.0)
    tree = drawn(series, y=y)
    found = places(tree)
    assert found["three in ten million"][1] < found["in"][1]
    assert texts(tree).count("↑") == 1 and "10M" not in texts(tree)
    assert len(errors(tree)) == 1  # none for a value that is not drawn
    assert "↑" not in texts(drawn(series, y=Axis(label="y", log=True)))


def test_the_legend_names_what_differs() -> None:
    assert "only" not in texts(drawn(line("only", 1.0, 2.0), line("empty")))
    tree = drawn(line("a", 2.0, 3.0), line("b", 2.0, listed=False), rules=[(9.0, "dense")], note="a note")
    assert {"a", "dense", "a note"} <= set(texts(tree)) and "b" not in texts(tree)


def test_long_names_leave_room_for_the_chart() -> None:
    name = "come[" + "x" * 200 + "]"
    tree = drawn(line(name, 1.0, 2.0), line("b", 2.0), note="n")
    assert name[:53] + "…" in texts(tree)
    assert "n" in texts(drawn(line("only", 1.0), note="n"))


def test_an_error_bar_may_reach_below_zero_on_a_logarithmic_axis() -> None:
    series = Series(name="a", points=[Point(x=0, y=1.0, error=3.0), Point(x=1, y=2.0)], hue=0)
    assert len(errors(drawn(series, y=Axis(label="", log=True)))) == 1


def test_ticks_are_round_and_few() -> None:
    assert ticks(Axis(label="x", whole=True), 21, 29) == ["22", "24", "26", "28"]
    assert ticks(layers_axis([27, 25, 21, 25]), 27, 25, 21) == ["21", "25", "27"]
    assert layers_axis(range(40)).ticks == ()
    assert ticks(Axis(label="x", log=True), 20.0, 800.0) == ["20", "50", "100", "200", "500"]
    assert 3 <= len(ticks(Axis(label="x", log=True), 29.0, 33.0)) <= 8


def test_heat_is_stronger_where_values_are_larger() -> None:
    tree = ElementTree.fromstring(heat([[0.0, 1.0, 10.0, 100.0], [100.0] * 4], title="t", across="pieces"))
    cells = [path for path in tree.iter(f"{SVG}path") if path.get("fill") == "var(--accent)"]
    shades = [float(cell.get("fill-opacity", "1")) for cell in cells]
    # Nothing and the least are both palest, and equal neighbours are one rectangle.
    assert shades == [0.04, pytest.approx(0.573, abs=0.01), 1.0, 1.0]
    widths = [
        max(xs) - min(xs) for xs in ([float(x) for x in re.findall(r"([\d.]+) [\d.]+", c.get("d"))] for c in cells)
    ]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1) and widths[3] == pytest.approx(4 * widths[1], abs=0.1)


def test_a_chart_is_fit_for_a_strict_page_and_always_the_same() -> None:
    def once() -> Markup:
        axis = Axis(label="$x$")
        return chart([line("a", 1.0, 2.0), line("层", 3.0)], x=axis, y=axis, title="t", rules=[(1.0, "r")])

    text = once()
    assert text == once()
    assert "$x$" in text and "层" in text
    for unwanted in ("style", "metadata", "xlink", "<!DOCTYPE", "#0a0b", ' id="axes', "None"):
        assert unwanted not in text
    assert set(re.findall(r"var\(--(\w+)\)", text)) == {"soft", "rule", "s1"}
    assert set(re.findall(r"--(\w+):", variables())) == set(PALETTE)


def test_a_file_of_its_own_has_its_colours() -> None:
    text = standalone(chart([line("a", 1.0, 2.0)], x=Axis(label=""), y=Axis(label=""), title=""))
    light, dark = PALETTE["s1"]
    assert "var(" not in text and f'stroke="{light}"' in text and f'[stroke="{light}"]{{stroke:{dark}}}' in text
    ElementTree.fromstring(text)


@pytest.mark.parametrize("name", ['<script>alert("x")</script>', "a & b", "</svg>"])
def test_names_are_escaped(name: str) -> None:
    series = [Series(name=name, points=[Point(x=0, y=1.0, title=name)], hue=0), line("b", 2.0)]
    drawings = [
        chart(series, x=Axis(label=name), y=Axis(label=name), title=name, rules=[(1.0, name)], note=name),
        heat([[1.0]], title=name, across=name, down=name),
    ]
    for svg in drawings:
        assert name in [element.text for element in ElementTree.fromstring(svg).iter()]
        assert name not in svg[:-6]


@pytest.mark.parametrize(
    ("value", "text"), [(134.5e6, "134.5M"), (29.5411, "29.54"), (0.0341, "0.0341"), (25e3, "25k"), (1e12, "1T")]
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_left_out(value: float) -> None:
    assert list(places(drawn(line("a", value, 1.0, 2.0)))) == ["a 1", "a 2"]
