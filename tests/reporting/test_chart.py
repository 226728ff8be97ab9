"""Charts show what they are given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from intarsia.reporting.chart import Point, Rule, Series, chart, standalone, style
from intarsia.reporting.dots import Scored, dots_svg
from intarsia.reporting.heat import heat_svg
from intarsia.reporting.scale import Axis

SVG = "{http://www.w3.org/2000/svg}"


def line(name: str, *values: float, **how: object) -> Series:
    points = [Point(x=index, y=value, error=0.1, title=f"{name} {index}") for index, value in enumerate(values)]
    return Series(name=name, points=points, hue=1, **how)  # type: ignore[arg-type]


def drawn(*series: Series, **how: object) -> ElementTree.Element:
    return ElementTree.fromstring(chart(series, x=Axis(label="x"), y=Axis(label="y & z"), title="<t>", **how))  # type: ignore[arg-type]


def classes(tree: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in tree.iter() if name in element.get("class", "").split()]


def test_every_point_and_its_words() -> None:
    tree = drawn(line("a", 1.0, 2.0, 4.0), line("b", 3.0, dashed=True))
    assert len(classes(tree, "error")) == 4
    titles = [element.text for element in tree.iter(f"{SVG}title")]
    assert titles == ["<t>", "a 0", "a 1", "a 2", "b 0"]
    texts = [element.text for element in tree.iter(f"{SVG}text")]
    assert {"x", "y & z", "a", "b"} <= set(texts)
    assert len(classes(tree, "hollow")) == 2  # the point, and its sign in the legend


def test_higher_values_lie_higher() -> None:
    tree = drawn(Series(name="a", points=[Point(x=0, y=1.0), Point(x=1, y=5.0)], hue=0))
    low, high = (float(dot.get("cy", "0")) for dot in tree.iter(f"{SVG}circle"))
    assert high < low
    left, right = (float(dot.get("cx", "0")) for dot in tree.iter(f"{SVG}circle"))
    assert left < right


def test_a_value_beyond_the_axis_is_drawn_at_its_end_with_an_arrow() -> None:
    points = [Point(x=0, y=20.0, error=1.0), Point(x=1, y=3e7, error=2e6, title="three in ten million")]
    series = Series(name="a", points=points, hue=0)
    y = Axis(label="", log=True, most=100.0)
    tree = ElementTree.fromstring(chart([series], x=Axis(label=""), y=y, title=""))
    low, high = (float(dot.get("cy", "0")) for dot in tree.iter(f"{SVG}circle"))
    assert high < low
    texts = [element.text for element in tree.iter(f"{SVG}text")]
    assert texts.count("↑") == 1 and "1e+07" not in texts and "10M" not in texts
    assert len(classes(tree, "error")) == 1  # none where the value is not drawn
    assert "three in ten million" in [element.text for element in tree.iter(f"{SVG}title")]
    inside = ElementTree.fromstring(chart([series], x=Axis(label=""), y=Axis(label="", log=True), title=""))
    assert "↑" not in [element.text for element in inside.iter(f"{SVG}text")]


def test_a_single_series_has_no_legend_and_an_empty_one_is_left_out() -> None:
    tree = drawn(line("only", 1.0, 2.0), line("empty"))
    assert "only" not in [element.text for element in tree.iter(f"{SVG}text")]


def test_rules_are_within_the_chart() -> None:
    tree = drawn(line("a", 2.0, 3.0), rules=[Rule(y=9.0, name="dense")])
    (rule,) = classes(tree, "rule")
    height = float(rule.get("d", "").split()[1].split("H")[0])
    assert 0 < height < 300
    assert "dense" in [element.text for element in tree.iter(f"{SVG}text")]


def test_an_error_bar_may_reach_below_zero_on_a_logarithmic_axis() -> None:
    series = Series(name="a", points=[Point(x=0, y=1.0, error=3.0), Point(x=1, y=2.0)], hue=0)
    tree = ElementTree.fromstring(chart([series], x=Axis(label=""), y=Axis(label="", log=True), title=""))
    assert len(classes(tree, "error")) == 1


def test_a_file_of_its_own_carries_its_style() -> None:
    text = standalone(chart([line("a", 1.0, 2.0)], x=Axis(label=""), y=Axis(label=""), title=""))
    tree = ElementTree.fromstring(text)
    (found,) = list(tree.iter(f"{SVG}style"))
    assert found.text == style()
    assert "style=" not in text  # a page with a strict policy refuses inline styles


def test_heat_is_darker_where_values_are_larger() -> None:
    tree = ElementTree.fromstring(heat_svg([[0.0, 1.0, 10.0, 100.0], [100.0] * 4], title="t", across="pieces"))
    shades = [element.get("class") for element in tree.iter(f"{SVG}rect")]
    # Nothing and the least are both lightest, and equal neighbours are one rectangle.
    assert shades == ["h0", "h5", "h9", "h9"]
    widths = [float(element.get("width", "0")) for element in tree.iter(f"{SVG}rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.11) and widths[3] == pytest.approx(4 * widths[1], abs=0.2)


def test_dots_lie_by_value_within_their_intervals() -> None:
    rows = [
        Scored(name="a", value=0.5, low=0.4, high=0.6, hue=0),
        Scored(name="b", value=0.7, low=0.65, high=0.75, hue=4, hollow=True),
    ]
    tree = ElementTree.fromstring(dots_svg(rows, axis=Axis(label="acc"), title="t", rules=[(0.25, "chance")]))
    first, second = (float(dot.get("cx", "0")) for dot in tree.iter(f"{SVG}circle"))
    assert first < second
    start, stop = (float(part) for part in classes(tree, "error")[0].get("d", "")[1:].replace("H", " ").split()[::2])
    assert start < first < stop
    assert "a: 0.5, 95 % interval 0.4 to 0.6" in [element.text for element in tree.iter(f"{SVG}title")]


@pytest.mark.parametrize("name", ['<script>alert("x")</script>', "a & b"])
def test_names_are_escaped(name: str) -> None:
    assert name not in chart([line(name, 1.0), line("b", 2.0)], x=Axis(label=name), y=Axis(label=name), title=name)
