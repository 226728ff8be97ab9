"""How good a search was after how many trials.

Each cost is given as its excess over the unpruned base's on the same examples, (cost - base) / base. At every number of
trials two numbers describe the trials so far that were scored at the greatest budget:

- the least of max_i(e_i) + 0.05 sum_i(e_i) over them (ParEGO's function with equal weights that sum to as many as there
  are objectives): what the most lost objective has lost;
- the volume that they dominate in the cube from no excess (as good as the base) to an excess of 1 (twice the base's
  cost), as a share of that cube; better than the base counts beyond it.

Before the first trial at the greatest budget there is no number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.reporting.figures import Axis, Point, Series, chart, standalone
from intarsia.tailoring.engine import ALPHA
from intarsia.tailoring.run import Trial, non_dominated

Excess = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """After each number of trials, from 1: the least scalarised excess, and the dominated volume (None: none yet)."""

    best: tuple[float | None, ...]
    volume: tuple[float | None, ...]


def curve_of(trials: Iterable[Trial], base: Sequence[float], budget: int) -> Curve:
    """The curve of a search from its log."""
    found: list[Excess] = []
    best: list[float | None] = []
    volumes: list[float | None] = []
    for trial in trials:
        if trial.costs is not None and trial.budget == budget:
            found.append(tuple((cost - whole) / whole for cost, whole in zip(trial.costs, base, strict=True)))
            best.append(min(scalar(excess) for excess in found))
            volumes.append(volume(found))
        else:
            best.append(best[-1] if best else None)
            volumes.append(volumes[-1] if volumes else None)
    return Curve(best=tuple(best), volume=tuple(volumes))


def scalar(excess: Excess) -> float:
    """ParEGO's function, all objectives alike."""
    return max(excess) + ALPHA * sum(excess)


def volume(points: Sequence[Excess], corner: float = 1.0) -> float:
    """The volume between some points and the corner at which every excess is `corner` that they dominate."""
    inside = [point for point in points if all(value < corner for value in point)]
    front = [inside[index] for index in non_dominated(inside)]
    return _volume(front, corner)


def _volume(front: Sequence[Excess], corner: float) -> float:
    """By slices along the last objective."""
    if not front:
        return 0.0
    if len(front[0]) == 1:
        return corner - min(point[0] for point in front)
    ordered = sorted(front, key=lambda point: point[-1])
    heights = [point[-1] for point in ordered] + [corner]
    total = 0.0
    for index in range(len(ordered)):
        shadow = [point[:-1] for point in ordered[: index + 1]]
        total += (heights[index + 1] - heights[index]) * _volume(shadow, corner)
    return total


def figure(curves: Mapping[str, Sequence[Curve]], kind: str) -> str:
    """The mean of every engine over its seeds against trials, as an SVG file; kind is `best` or `volume`."""
    words = {"best": "least scalarised excess cost over the base", "volume": "dominated volume"}[kind]
    series = []
    for hue, (engine, seeds) in enumerate(curves.items()):
        points = [Point(x=float(count), y=value) for count, value in mean_curve(seeds, kind)]
        series.append(Series(name=engine, points=points, hue=hue, dots=False))
    return standalone(chart(series, x=Axis(label="trials"), y=Axis(label=words), title=f"Engines: {words}"))


def mean_curve(seeds: Sequence[Curve], kind: str) -> list[tuple[int, float]]:
    """The mean over seeds, from the number of trials at which all of them have a value."""
    rows = zip(*(getattr(curve, kind) for curve in seeds), strict=False)
    return [
        (count, math.fsum(row) / len(row)) for count, row in enumerate(rows, start=1) if all(v is not None for v in row)
    ]


def write(folder: Path, curves: Mapping[str, Mapping[int, Curve]]) -> dict[str, Any]:
    """Write `curves.json` and a figure of each kind; return the plain data."""
    import json

    data = {
        engine: {str(seed): {"best": curve.best, "volume": curve.volume} for seed, curve in seeds.items()}
        for engine, seeds in curves.items()
    }
    (folder / "curves.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for kind in ("best", "volume"):
        text = figure({engine: list(seeds.values()) for engine, seeds in curves.items()}, kind)
        (folder / f"engines-{kind}.svg").write_text(text, encoding="utf-8")
    return data
