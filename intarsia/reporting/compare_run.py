"""A comparison of methods as a part of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.reporting import comparison, comparison_table
from intarsia.reporting.blocks import Code, Facts, Figure, Ladder, Section, Subject, Table, Tile
from intarsia.reporting.commands import compare_command
from intarsia.reporting.comparison import DENSE, MEAN, Comparison, Row
from intarsia.reporting.comparison_figure import curves, figure
from intarsia.reporting.dots import Scored, dots_svg
from intarsia.reporting.picture import picture_svg, pieces_of
from intarsia.reporting.scale import Axis, short
from intarsia.reporting.wording import model_name, written

_ERRORS = 1.96  # standard errors to either side hold 95 %


def is_comparison(path: Path) -> bool:
    """Whether a folder holds a comparison."""
    return (path / comparison.SETTINGS).is_file()


def read(path: Path) -> Subject:
    """The comparison as a subject.

    Raises:
        UserError: it is damaged.
    """
    found = comparison.load(path)
    return Subject(
        path=path,
        title=f"{model_name(found.model)}: methods compared",
        subtitle=f"{len({row.method for row in found.rows} - {DENSE})} methods, {len(found.rows)} models"
        + (f", judged on {', '.join(found.texts)}" if found.texts else ""),
        base=(found.base_sha256 or "", model_name(found.model)),
        tiles=_tiles(found),
        notes=_notes(found),
        sections=[
            *_quality(found),
            *_tasks(found),
            *_speed(found),
            *_table(found),
            *_puzzles(found),
            _origin(found),
        ],
        ladders=_ladders(found),
        texts={str(text.get("sha256") or text["name"]): str(text["name"]) for text in found.eval_texts},
    )


def _notes(found: Comparison) -> list[str]:
    if not found.rows:
        return ["This comparison is not finished: no model has been measured yet."]
    asked = found.asked
    missing = [key for key in asked if key not in {row.key for row in found.rows}]
    if missing:
        names = ", ".join(f"{method} at {layers}" for method, layers, _ in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return [f"This comparison is not finished: {len(missing)} models are still to come ({names}{more})."]
    return [] if found.dense else ["The original model has not been measured."]


def _tiles(found: Comparison) -> list[Tile]:
    """The best of every depth is what a reader asks for first."""
    if not found.texts or not found.rows:
        return []
    text = found.texts[0]
    tiles = []
    if found.dense is not None and text in found.dense.perplexity:
        tiles.append(Tile(name=f"dense, {text}", now=short(found.dense.perplexity[text]["value"])))
    for layers in sorted({row.layers for row in found.rows if row.method != DENSE}, reverse=True):
        rows = [row for row in found.rows if row.layers == layers and row.method != DENSE and text in row.perplexity]
        if rows:
            best = min(rows, key=lambda row: float(row.perplexity[text]["value"]))
            tiles.append(
                Tile(name=f"best at {layers} layers", now=short(best.perplexity[text]["value"]), change=best.name)
            )
    return tiles


def _quality(found: Comparison) -> list[Section]:
    figures = [
        Figure(svg=figure(found, against="layers", quality=text), caption=f"{text}; bars are one standard error.")
        for text in found.texts
        if any(text in row.perplexity for row in found.rows)
    ]
    if any(row.parameters for row in found.rows) and found.texts and figures:
        text = found.texts[0]
        svg = figure(found, against="parameters", quality=text)
        figures.append(Figure(svg=svg, caption=f"{text}, against the size of the model."))
    return [Section(title="Perplexity", blocks=figures, intro="Lower is better.")] if figures else []


def _tasks(found: Comparison) -> list[Section]:
    scored = [row for row in found.rows if row.tasks]
    if not scored:
        return []
    blocks: list[Any] = []
    methods = list(dict.fromkeys(row.method for row in found.rows if row.method != DENSE))
    for layers in sorted({row.layers for row in scored if row.method != DENSE}, reverse=True):
        rows = [row for row in scored if row.layers == layers and row.method != DENSE]
        figure_ = _dots(found, rows, MEAN, methods, f"Mean accuracy at {layers} layers")
        if figure_ is not None:
            blocks.append(figure_)
    for task in found.tasks:
        rows = [row for row in scored if row.method != DENSE and row.layers == min(r.layers for r in scored)]
        figure_ = _dots(found, rows, task, methods, f"{task} at {rows[0].layers} layers" if rows else task)
        if figure_ is not None:
            blocks.append(figure_)
    kept = _retention(scored)
    return [Section(title="Tasks", blocks=[*blocks, *kept], intro="Dots with 95 % intervals; higher is better.")]


def _dots(found: Comparison, rows: Sequence[Row], task: str, methods: Sequence[str], title: str) -> Figure | None:
    scored = []
    for row in rows:
        measure = row.score(task)
        if measure is not None and measure.get("value") is not None:
            value, error = float(measure["value"]), _ERRORS * float(measure.get("stderr") or 0.0)
            scored.append(
                Scored(
                    name=row.name,
                    value=value,
                    low=value - error,
                    high=value + error,
                    hue=methods.index(row.method),
                    hollow=row.heal != "none",
                )
            )
    if not scored:
        return None
    rules = []
    dense = None if found.dense is None else found.dense.score(task)
    if dense is not None and dense.get("value") is not None:
        rules.append((float(dense["value"]), DENSE))
    chance = _chance(rows, task)
    if chance is not None:
        rules.append((chance, "chance"))
    svg = dots_svg(scored, axis=Axis(label="accuracy"), title=title, rules=rules)
    return Figure(svg=svg, caption=f"{title}.")


def _chance(rows: Sequence[Row], task: str) -> float | None:
    """What guessing gives: of a task, or the mean over all."""
    for row in rows:
        scores = (row.tasks or {}).get("scores") or []
        chances = [score.get("chance") for score in scores if task in (MEAN, score.get("name"))]
        if chances and None not in chances:
            return float(sum(chances) / len(chances))
    return None


def _retention(rows: Sequence[Row]) -> list[Table]:
    """What is kept of the original's accuracy on the same items, with its interval."""
    found = []
    for row in rows:
        kept = ((row.tasks or {}).get("retention") or {}).get("mean")
        if kept:
            found.append(
                [
                    row.name,
                    str(row.layers),
                    _ratio(kept.get("accuracy")),
                    _ratio(kept.get("above_chance")),
                    str(kept.get("n", "")),
                ]
            )
    if not found:
        return []
    columns = ("method", "layers", "accuracy kept", "kept above chance", "items")
    caption = "Kept of the original's accuracy on the same items, with paired bootstrap intervals (95 %)"
    return [Table(columns=columns, rows=found, caption=caption, numbers=frozenset({1, 2, 3, 4}))]


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if not ratio:
        return ""
    low, high = ratio.get("low"), ratio.get("high")
    return f"{ratio['value']:.1%}" + ("" if low is None or high is None else f" ({low:.1%} to {high:.1%})")


def _speed(found: Comparison) -> list[Section]:
    if not any(row.decode_tokens_per_s for row in found.rows) or not found.texts:
        return []
    quality = MEAN if any(row.score(MEAN) for row in found.rows) else found.texts[0]
    svg = figure(found, against="decode_tokens_per_s", quality=quality)
    return [Section(title="Speed", blocks=[Figure(svg=svg, caption="Quality against the speed of writing.")])]


def _table(found: Comparison) -> list[Section]:
    if not found.rows:
        return []
    names = [name for name in comparison_table.columns(found) if not name.endswith(" stderr")]
    rows = [[comparison_table.written_cell(name, row) for name in names] for row in comparison_table.cells(found)]
    numbers = frozenset(index for index, name in enumerate(names) if name not in ("method", "heal"))
    return [Section(title="All numbers", blocks=[Table(columns=names, rows=rows, numbers=numbers)])]


def _puzzles(found: Comparison) -> list[Section]:
    """How each method cuts at the least depth, where the recipes are at hand."""
    rows = [row for row in found.rows if row.recipe and row.method != DENSE]
    least = min((row.layers for row in rows), default=0)
    figures = []
    for row in {row.method: row for row in rows if row.layers == least}.values():
        place = (found.path / str(row.recipe)).resolve()
        if found.path.resolve() not in place.parents or not place.is_file():
            continue
        try:
            recipe = schema.load(place)
        except UserError:
            continue
        figures.append(Figure(svg=picture_svg(recipe, pieces_of(recipe)), caption=row.method))
    if not figures:
        return []
    return [Section(title=f"How each method cuts to {least} layers", blocks=figures)]


def _ladders(found: Comparison) -> list[Ladder]:
    return [
        Ladder(
            name=rows[0].name,
            measure=f"perplexity, {text['name']}",
            text=str(text.get("spec") or text["name"]),
            text_key=str(text.get("sha256") or text["name"]),
            points=[
                (row.layers, row.perplexity[text["name"]]["value"]) for row in rows if text["name"] in row.perplexity
            ],
        )
        for text in found.eval_texts
        for rows in curves(found.rows).values()
    ]


def _origin(found: Comparison) -> Section:
    pairs = [("model", found.model), ("weights, sha256", found.base_sha256 or "not recorded")]
    pairs += [(name.replace("_", " "), written(value)) for name, value in found.settings.items() if value is not None]
    for text in found.eval_texts:
        pairs.append((f"text {text['name']}", written({k: v for k, v in text.items() if k != "name"})))
    command = compare_command(found.facts, out=found.path.name)
    code = [] if command is None else [Code(text=command)]
    return Section(title="Where this comes from", blocks=[*code, Facts(pairs=pairs)])
