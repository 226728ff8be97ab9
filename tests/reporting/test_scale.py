from __future__ import annotations

import pytest

from intarsia.reporting.scale import Axis, Scale, fitted, layers_axis, log_ticks, short, ticks


def test_places() -> None:
    scale = Scale(axis=Axis(label=""), low=0.0, high=10.0, start=100.0, stop=200.0)
    assert [scale.at(value) for value in (0, 5, 10)] == [100.0, 150.0, 200.0]
    falling = Scale(axis=Axis(label="", falling=True), low=0.0, high=10.0, start=100.0, stop=200.0)
    assert [falling.at(value) for value in (0, 10)] == [200.0, 100.0]
    log = Scale(axis=Axis(label="", log=True), low=1.0, high=100.0, start=0.0, stop=2.0)
    assert [log.at(value) for value in (1, 10, 100)] == pytest.approx([0.0, 1.0, 2.0])


def test_ticks_are_round_and_within() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(21.0, 29.0, whole=True) == [22.0, 24.0, 26.0, 28.0]
    assert ticks(3.0, 5.0, whole=True) == [3.0, 4.0, 5.0]
    assert ticks(-0.3, 0.3) == [-0.2, 0.0, 0.2]


def test_logarithmic_ticks_are_enough_and_not_too_many() -> None:
    assert log_ticks(0.9, 1100.0) == [1.0, 10.0, 100.0, 1000.0]
    assert log_ticks(20.0, 300.0) == [20.0, 50.0, 100.0, 200.0]
    assert 4 <= len(log_ticks(29.0, 33.0)) <= 8


def test_fitted_shows_every_value() -> None:
    for axis in (Axis(label=""), Axis(label="", log=True), Axis(label="", falling=True)):
        for values in ([1.0, 9.0], [5.0], [3.0, 3.0]):
            scale = fitted(axis, values, 0.0, 100.0)
            assert all(0.0 <= scale.at(value) <= 100.0 for value in values)
    assert fitted(Axis(label="", zero=True), [2.0, 4.0], 0.0, 1.0).at(0.0) == 0.0


def test_few_depths_are_all_named() -> None:
    assert [text for _, text in fitted(layers_axis([27, 25, 21, 25]), [21, 27], 0, 9).ticks()] == ["21", "25", "27"]
    assert layers_axis(range(40)).only == ()


@pytest.mark.parametrize(
    ("value", "text"), [(134.5e6, "134.5M"), (29.5411, "29.54"), (0.0341, "0.0341"), (25e3, "25k"), (1e12, "1T")]
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text
