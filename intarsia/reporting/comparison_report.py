"""The report's part about a comparison of methods, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from markupsafe import Markup

from intarsia.errors import UserError, few
from intarsia.recipe import schema
from intarsia.reporting.blocks import Block, Figure, Measured, Origin, Section, Subject, Table, Tile, Written
from intarsia.reporting.comparison import ANSWERS, DENSE, MEAN, SETTINGS, Comparison, Row, load, written
from intarsia.reporting.figures import Axis, Point, Series, chart, layers_axis
from intarsia.reporting.puzzle import pieces_of, puzzle_svg
from intarsia.reporting.wording import PARTING, model_name, pairs_of, short

_BROKEN = 30.0  # times the original's perplexity, beyond which values are cut off
_LONG_TABLE = 12
_ACROSS = {"parameters": "parameters", "layers": "layers", "decode_tokens_per_s": "tokens/s, decode"}


def is_comparison(path: Path) -> bool:
    """Whether a folder holds a comparison."""
    return (path / SETTINGS).is_file()


def read(path: Path) -> Subject:
    """Read a comparison as a subject.

    Raises:
        UserError: it is damaged.
    """
    found = load(path)
    return Subject(
        title=f"{model_name(found.model)}: methods compared",
        subtitle=f"{len(found.rows)} models" + (f", evaluated on {', '.join(found.texts)}" if found.texts else ""),
        base=(found.base_sha256 or "", model_name(found.model)),
        tiles=_tiles(found),
        notes=_notes(found),
        sections=[
            _quality(found),
            _agreement(found),
            Section(title="Answers side by side", blocks=_answers(found), intro=PARTING),
            _tasks(found),
            _speed(found),
            Section(title="All numbers", blocks=[written(found)] if found.rows else []),
            _puzzles(found),
            _origin(found),
        ],
        ladders=_ladders(found),
        texts={str(text.get("sha256") or text["name"]): str(text["name"]) for text in found.eval_texts},
    )


def figure(found: Comparison, *, against: str = "parameters", quality: str) -> Markup:
    """Draw the quality of every model: a curve for each method, dashed and hollow for healed models.

    Args:
        against: `parameters`, `layers` or `decode_tokens_per_s`.
        quality: the name of an evaluation text (perplexity), of a task, `mean` (of the tasks), or a key of `ANSWERS`.
    """
    is_text = any(quality in row.perplexity for row in found.rows)

    def points(rows: Sequence[Row]) -> list[Point]:
        measured = [(row, getattr(row, against), row.measure(quality)) for row in rows]
        return [
            Point(
                x=float(x),
                y=measure["value"],
                error=measure.get("stderr"),
                title=f"{row.name}, {row.layers} layers: {measure['value']:.4g}",
            )
            for row, x, measure in measured
            if measure is not None and x is not None
        ]

    grouped, methods = found.curves, found.methods
    series = [
        Series(
            name=method if (method, "none") in grouped else rows[0].name,
            points=points(rows),
            hue=methods.index(method),
            dashed=heal != "none",
            listed=heal == "none" or (method, "none") not in grouped,
        )
        for (method, heal), rows in grouped.items()
    ]
    dense = found.of_dense(quality)
    label = f"perplexity, {quality}" if is_text else quality if quality in ANSWERS else f"accuracy, {quality}"
    most = _BROKEN * dense if is_text and dense is not None else None
    notes = ["dashed, hollow: healed"] if any(each.dashed for each in series) else []
    if most is not None and any(point.y > most for each in series for point in each.points):
        notes.append(f"arrow: more than {_BROKEN:.0f} times the original's")
    rules = ((dense, DENSE), (_chance(found, quality), "chance"))
    by_depth = against == "layers"
    return chart(
        series,
        x=layers_axis(row.layers for row in found.pruned) if by_depth else Axis(label=_ACROSS[against]),
        y=Axis(label=label, log=is_text, most=most, zero=quality == "answers that loop"),
        rules=[(value, name) for value, name in rules if value is not None],
        note="; ".join(notes),
        title=f"{label} against {_ACROSS[against]}",
    )


def _chance(found: Comparison, task: str) -> float | None:
    """The accuracy of guessing, on a task or as the mean over all of them."""
    scores = next((row.tasks["scores"] for row in found.rows if row.tasks), ())
    chances = [score.get("chance") for score in scores if task in (MEAN, score["name"])]
    return sum(chances) / len(chances) if chances and None not in chances else None


def _notes(found: Comparison) -> list[str]:
    if not found.rows:
        return ["This comparison is not finished: no model has been measured yet."]
    done = {row.key for row in found.rows}
    if missing := [f"{key[0]} at {key[1]}" for key in found.asked if key not in done]:
        names = few(missing, 4)
        return [f"This comparison is not finished. Models not measured yet: {len(missing)} ({names})."]
    return [] if found.dense else ["The original model has not been measured."]


def _tiles(found: Comparison) -> list[Tile]:
    """The best model of every depth."""
    text, tiles = next(iter(found.texts), ""), []
    if found.dense is not None and text in found.dense.perplexity:
        tiles.append(Tile(name=f"dense, {text}", now=short(found.dense.perplexity[text]["value"])))
    for layers in found.depths:
        if rows := [row for row in found.pruned if row.layers == layers and text in row.perplexity]:
            best = min(rows, key=lambda row: float(row.perplexity[text]["value"]))
            value = short(best.perplexity[text]["value"])
            agree = "" if best.answers is None else f", agreement {best.answers['agreement']['value']:.3f}"
            tiles.append(Tile(name=f"best at {layers} layers", now=value, change=f"{best.name}{agree}"))
    return tiles


def _by_depth(found: Comparison, quality: str, caption: str) -> Figure:
    return Figure(
        svg=figure(found, against="layers", quality=quality), caption=f"{caption}; bars are one standard error."
    )


def _quality(found: Comparison) -> Section:
    figures = [
        _by_depth(found, text, text) for text in found.texts if any(text in row.perplexity for row in found.rows)
    ]
    if figures and any(row.parameters for row in found.rows):
        text = found.texts[0]
        svg = figure(found, against="parameters", quality=text)
        figures.append(Figure(svg=svg, caption=f"{text}, against the size of the model."))
    return Section(title="Perplexity", blocks=figures, intro="Lower is better.")


def _agreement(found: Comparison) -> Section:
    """Agreement with the original's answers, and the share of looping answers."""
    shown = [
        name
        for name in ("agreement", "answers that loop")
        if any((row.answers or {}).get(ANSWERS[name]) for row in found.rows)
    ]
    intro = "The share of next tokens equal to the original's along its answers"
    if len(shown) > 1:
        intro += ", and the share of a model's own answers that end in a loop"
    return Section(title="Answers", blocks=[_by_depth(found, name, name) for name in shown], intro=f"{intro}.")


def _answers(found: Comparison) -> list[Written]:
    """The answers of all models to the first prompt, by depth."""
    blocks = []
    for layers in found.depths:
        shown = {
            row.name: row.answers["examples"][0]
            for row in found.pruned
            if row.layers == layers and row.answers and row.answers.get("examples")
        }
        for example in list(shown.values())[:1]:
            original = ("original", ["".join(example["original"]), "", ""])
            answers = [original, *((name, each["new"]) for name, each in shown.items())]
            blocks.append(Written(prompt=f"{layers} layers: {example['prompt']}", answers=answers))
    return blocks


def _tasks(found: Comparison) -> Section:
    scored = [row for row in found.pruned if row.tasks]
    names = [*([MEAN] if len(found.tasks) > 1 else []), *found.tasks] if scored else []
    blocks: list[Block] = [_by_depth(found, name, "accuracy" if name == MEAN else name) for name in names]
    return Section(title="Tasks", blocks=[*blocks, *_retention(scored)], intro="Higher is better.")


def _retention(rows: Sequence[Row]) -> list[Table]:
    """The share of the original's accuracy that is kept on the same items, with its interval."""
    found = [(row, ((row.tasks or {}).get("retention") or {}).get("mean")) for row in rows]
    cells = [
        {
            "method": row.name,
            "layers": str(row.layers),
            "accuracy kept": _share(kept.get("accuracy")),
            "kept above chance": _share(kept.get("above_chance")),
            "items": str(kept.get("n", "")),
        }
        for row, kept in found
        if kept
    ]
    caption = "Accuracy kept on the same items, with paired bootstrap intervals (95 %)"
    return [Table(rows=cells, words=("method",), caption=caption, folded=len(cells) > _LONG_TABLE)] if cells else []


def _share(ratio: Mapping[str, float] | None) -> str:
    if not ratio:
        return ""
    low, high = ratio.get("low"), ratio.get("high")
    return f"{ratio['value']:.1%}" + ("" if low is None or high is None else f" ({low:.1%} to {high:.1%})")


def _speed(found: Comparison) -> Section:
    blocks = []
    if any(row.decode_tokens_per_s for row in found.rows) and found.texts:
        quality = MEAN if any(row.measure(MEAN) for row in found.rows) else found.texts[0]
        svg = figure(found, against="decode_tokens_per_s", quality=quality)
        blocks.append(Figure(svg=svg, caption="Quality against decoding speed."))
    return Section(title="Speed", blocks=blocks)


def _puzzles(found: Comparison) -> Section:
    """The puzzle of each method at the least depth, if its recipe is in the folder."""
    rows = [row for row in found.pruned if row.recipe]
    least = min((row.layers for row in rows), default=0)
    figures: list[Block] = []
    for row in {row.method: row for row in rows if row.layers == least}.values():
        place = (found.path / str(row.recipe)).resolve()
        if found.path.resolve() not in place.parents or not place.is_file():
            continue
        with suppress(UserError):
            recipe = schema.load(place)
            figures.append(Figure(svg=puzzle_svg(recipe, pieces_of(recipe)), caption=row.method))
    return Section(title=f"The puzzle of each method at {least} layers", blocks=figures)


def _ladders(found: Comparison) -> list[Measured]:
    return [
        Measured(
            name=rows[0].name,
            measure=f"perplexity, {text['name']}",
            text=str(text.get("spec") or text["name"]),
            text_key=str(text.get("sha256") or text["name"]),
            points=[
                (row.layers, row.perplexity[text["name"]]["value"]) for row in rows if text["name"] in row.perplexity
            ],
        )
        for text in found.eval_texts
        for rows in found.curves.values()
    ]


def _origin(found: Comparison) -> Section:
    facts = [("model", found.model), ("weights, sha256", found.base_sha256 or "not recorded")]
    facts += pairs_of(found.settings)
    for text in found.eval_texts:
        facts += pairs_of({f"text {text['name']}": {name: value for name, value in text.items() if name != "name"}})
    origin = Origin(commands=[found.command] if found.command else [], facts=facts)
    return Section(title="How to reproduce it", blocks=[origin])
