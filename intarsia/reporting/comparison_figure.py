"""The figure of a comparison: quality against size, depth or speed, a curve a method."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.reporting.chart import Point, Rule, Series, chart, standalone
from intarsia.reporting.comparison import DENSE, Comparison, Measure, Row
from intarsia.reporting.scale import Axis, layers_axis, short

_NO_MODEL = 30.0  # times the original's perplexity: whether it is that or a thousand times more tells nothing

_ACROSS = {
    "parameters": Axis(label="parameters", write=short),
    "layers": layers_axis(()),
    "decode_tokens_per_s": Axis(label="tokens/s written", write=short),
}


def curves(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of every method and heal, in the order in which they first appear; without the original."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.method != DENSE:
            found.setdefault((row.method, row.heal), []).append(row)
    return found


def figure(comparison: Comparison, *, against: str = "parameters", quality: str, title: str | None = None) -> str:
    """Quality of every model, a curve a method (dashed and hollow where it was healed), as SVG for a page.

    Args:
        against: `parameters`, `layers` or `decode_tokens_per_s`.
        quality: the name of an evaluation text (perplexity), of a task, or `mean` (of the tasks).
    """
    is_text = any(quality in row.perplexity for row in comparison.rows)

    def measure(row: Row) -> Measure | None:
        return row.perplexity.get(quality) if is_text else row.score(quality)

    def point(row: Row) -> Point | None:
        found, x = measure(row), getattr(row, against)
        if found is None or found.get("value") is None or x is None:
            return None
        said = f"{row.name}, {row.layers} layers: {found['value']:.4g}"
        return Point(x=float(x), y=found["value"], error=found.get("stderr"), title=said)

    grouped = curves(comparison.rows)
    methods = list(dict.fromkeys(method for method, _ in grouped))
    series = [
        Series(
            name=method if (method, "none") in grouped else rows[0].name,
            points=[each for each in map(point, rows) if each is not None],
            hue=methods.index(method),
            dashed=heal != "none",
            listed=heal == "none" or (method, "none") not in grouped,
        )
        for (method, heal), rows in grouped.items()
    ]
    by_depth = against == "layers"
    healed = any(heal != "none" for _, heal in grouped)
    dense = None if comparison.dense is None else measure(comparison.dense)
    label = f"perplexity, {quality}" if is_text else f"accuracy, {quality}"
    own = None if dense is None else dense.get("value")
    rules = [] if own is None else [Rule(y=own, name=DENSE)]
    up = Axis(label=label, log=is_text, most=_NO_MODEL * own if is_text and own is not None else None)
    notes = ["dashed, hollow: healed in closed form"] if healed else []
    if up.most and any(up.beyond(point.y) for each in series for point in each.points):
        notes.append(f"arrow: more than {_NO_MODEL:.0f} times the original's")
    return chart(
        series,
        x=layers_axis(row.layers for row in comparison.rows if row.method != DENSE) if by_depth else _ACROSS[against],
        y=up,
        rules=rules,
        note="; ".join(notes),
        title=title or f"{label} against {_ACROSS[against].label}",
    )


def figure_file(comparison: Comparison, *, against: str = "parameters", quality: str) -> str:
    """`figure` as the text of an SVG file of its own."""
    return standalone(figure(comparison, against=against, quality=quality))
