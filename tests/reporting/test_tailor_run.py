"""What a report tells of a search over a family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.ops import Concat, Cut, LayerRef, Merge, Mix, Op, Select
from intarsia.recipe.recipe import Recipe, Variant, derive_spans
from intarsia.reporting.blocks import Figure, Pictures, Section, Subject, Table
from intarsia.reporting.page import report_html
from intarsia.reporting.tailor_puzzle import told
from intarsia.reporting.tailor_run import read
from intarsia.tailoring.candidate import Candidate, single
from intarsia.tailoring.history import History, Trial

NAMES = ("science", "prose")
BASE = Variant(name="base", model="demo", sha256="a" * 64)
MATH = Variant(name="math", model="lora", sha256="b" * 64)


def of(layer: int, variant: str = "base") -> LayerRef:
    return LayerRef(variant=variant, layer=layer)


JOINED = Concat(
    cuts=(
        Cut(source=of(3), kv_groups=(0,), channels=(0, 1, 2), weights={"attention": 0.5, "mlp": 0.75}),
        Cut(source=of(4, "math"), kv_groups=(1,), channels=(3,), weights={"attention": 0.5, "mlp": 0.25}),
    )
)
MERGED = Merge(sources=(of(1, "math"),), weights=(0.3,), method="task_arithmetic", base=of(1), scale=0.9, params={})


def recipe(*layers: Op) -> Recipe:
    return Recipe(variants=(BASE, MATH), base="base", depth=6, layers=layers, spans=derive_spans(layers, 6))


def trial(number: int, costs: tuple[float, float] | None, budget: int = 12, **more: Any) -> Trial:
    candidate = Candidate(positions=(0, 1, 2, number), choices=(single("base"),) * 4)
    status: Any = "failed" if costs is None else "ok"
    reason = "NaN in <prose>" if costs is None else None
    given = {"engine": "evolve", "origin": "mutation", "seconds": 2.0, "layer_forwards": 3.0, **more}
    return Trial(
        number=number,
        candidate=candidate,
        recipe=f"{number:064d}",
        budget=budget,
        seed=0,
        status=status,
        costs=costs,
        reason=reason,
        examples=(budget, budget),
        **given,
    )


TRIALS = (
    trial(0, (1.5, 4.0), 4),
    trial(1, (1.3, 4.0)),
    trial(2, (1.2, 5.0), origin="crossover"),
    trial(3, None),
    trial(4, (1.4, 3.5), engine="smac"),
    trial(5, (1.5, 4.5)),
    trial(6, (9.0, 30.0)),
)
"""Of those at 12 examples, 1, 2 and 4 are the front."""


def search(folder: Path, *, trials: tuple[Trial, ...] = TRIALS, wanted: int = 7, judged: bool = True) -> Path:
    """A run folder, as `intarsia tailor` leaves it."""
    (folder / "front").mkdir(parents=True)
    settings = {
        "kind": "tailor",
        "members": {v.name: {"model": v.model, "revision": None, "sha256": v.sha256} for v in (BASE, MATH)},
        "space": {"kind": "cut", "depth": 6, "target": 4, "log10_size": 11.7},
        "budgets": [4, 12],
        "base": {"science": 1.0, "prose": 3.0},
        "objectives": [
            {"name": "science", "kind": "task", "source": "arc.jsonl", "metric": "likelihood", "sha256": "c" * 64},
            {"name": "prose", "kind": "loss", "source": "news.txt", "metric": None, "sha256": "d" * 64},
        ],
        "engine": "smac",
        "seed": 0,
        "heal": "none",
        "device": None,
        "dtype": None,
        "versions": {"torch": "2.13"},
    }
    (folder / "tailor.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "family.yaml").write_text("base: demo  # <the base>\n", encoding="utf-8")
    (folder / "wanted.json").write_text(json.dumps({"trials": wanted}), encoding="utf-8")
    history = History(folder / "trials.jsonl")
    for each in trials:
        history.append(each)
    if not trials:
        return folder
    rows: list[dict[str, Any]] = [
        {
            "model": "base",
            "science": {"value": 1.1, "stderr": 0.05},
            "accuracy": {"science": {"value": 0.5, "stderr": 0.02}},
        },
        {
            "model": "incumbent",
            "science": {"value": 1.25, "stderr": 0.04},
            "accuracy": {"science": {"value": 0.4, "stderr": 0.02}},
            "kept": {"science": 0.8},
            "mean_kept": 0.8,
        },
    ]
    found = {"rows": [{"layers": 4, **row} for row in rows], "examples": {"science": 40}, "without": ["prose"]}
    (folder / "front.json").write_text(json.dumps({"judged": found} if judged else {}), encoding="utf-8")
    whole = [Select(source=of(layer)) for layer in (0, 1, 2, 5)]
    for number, layers in ((1, (whole[0], MERGED, JOINED, Select(source=of(5, "math")))), (2, whole), (4, whole)):
        schema.save(recipe(*layers), folder / "front" / f"trial-{number:05d}.yaml")
    return folder


def section(subject: Subject, title: str) -> Section:
    return next(each for each in subject.sections if each.title == title)


def tables(found: Section) -> list[list[dict[str, str]]]:
    return [
        [dict(zip(block.columns, row, strict=True)) for row in block.rows]
        for block in found.blocks
        if isinstance(block, Table)
    ]


def test_the_front(tmp_path: Path) -> None:
    subject = read(search(tmp_path / "run"))
    assert subject.title == "demo + math, 6 → 4 layers"
    tiles = {tile.name: (tile.before, tile.now, tile.change) for tile in subject.tiles}
    assert tiles["trials"] == ("", "7", "of about 10^12 candidates")
    assert tiles["front"] == ("", "3", "trial 1 is its knee")
    assert tiles["science, best cost"] == ("1", "1.2", "+20.0% against the uncut base")
    found = section(subject, "The Pareto front")
    (rows,) = tables(found)
    assert [row["trial"] for row in rows] == ["2", "1", "4"]
    assert [row["best in"] for row in rows] == ["science", "knee", "prose"]
    assert rows[0] == {
        "trial": "2",
        "science": "1.2",
        "prose": "5",
        "best in": "science",
        "engine": "evolve",
        "came from": "crossover",
    }
    (figure,) = [block for block in found.blocks if isinstance(block, Figure)]
    assert figure.caption == "prose against science, at 12 examples. Far outside and not drawn: 1."
    # One of the rest is near, two of the front are no knee, and the knee and the base have signs of their own.
    assert figure.svg.count("<g><title>trial") == 4 and figure.svg.count("the uncut base") == 1
    assert "trial 6" not in figure.svg


def test_what_was_judged(tmp_path: Path) -> None:
    found = section(read(search(tmp_path / "run")), "On unseen items")
    (rows,) = tables(found)
    assert rows[1] == {
        "model": "incumbent",
        "layers": "4",
        "science": "1.25 ± 0.04",
        "science, accuracy": "40.0% ± 2.0%",
        "accuracy kept": "80.0%",
    }
    assert rows[0]["accuracy kept"] == ""
    assert "40 of science" in found.intro and "all there is of prose" in found.intro


def test_the_puzzle_of_the_knee(tmp_path: Path) -> None:
    found = section(read(search(tmp_path / "run")), "The puzzle")
    board = found.blocks[0]
    assert isinstance(board, Pictures)
    assert board.summary == "Trial 1: 1 of base, 1 of math, 1 merged, 1 joined."
    assert board.data["depths"]["4"][3]["parts"] == [{"layer": 5, "wood": 1, "variant": "math"}]
    (rows,) = tables(found)
    assert [row["made of"] for row in rows] == [
        "base:0, whole",
        "task_arithmetic of 0.3 × math:1; output times 0.9",
        "base:3 (1 KV, 3 channels) + math:4 (1 KV, 1 channels)",
        "math:5, whole",
    ]
    captions = [block.caption for block in found.blocks if isinstance(block, Figure)]
    assert captions == [
        "The colours of the members.",
        "Trial 2, the best in science: 4 of base.",
        "Trial 4, the best in prose: 4 of base.",
    ]


def test_how_it_went(tmp_path: Path) -> None:
    subject = read(search(tmp_path / "run", wanted=20))
    found = section(subject, "The search")
    (rows,) = tables(found)
    assert [(row["engine"], row["examples"], row["trials"], row["failed"]) for row in rows] == [
        ("evolve", "4", "1", "0"),
        ("evolve", "12", "5", "1"),
        ("smac", "12", "1", "0"),
    ]
    (figure,) = [block for block in found.blocks if isinstance(block, Figure)]
    assert "uncut base" in figure.svg
    assert subject.notes[0] == "This search is not finished: 7 of 20 trials are made."
    assert subject.notes[1].startswith("Trials that failed: 1 (NaN in <prose>).")


def test_a_blend_in_two_parts() -> None:
    op = Merge(
        sources=(of(2), of(2, "math")),
        weights=(0.5, 0.5),
        method="linear",
        mlp=Mix(weights=(0.0, 1.0), method="ties", params={"density": 0.2, "lambda": 1.5}),
        base=of(2),
    )
    expected = "attention: linear of 0.5 × base:2, 0.5 × math:2; MLP: ties of 1 × math:2; density 0.2; lambda 1.5"
    assert told(op, "channels") == expected


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    page = report_html([search(tmp_path / "run")])
    assert "intarsia build run --best prose -o OUT" in page
    assert "&lt;the base&gt;" in page and "NaN in &lt;prose&gt;" in page and "<prose>" not in page


def test_a_search_that_has_just_begun(tmp_path: Path) -> None:
    subject = read(search(tmp_path / "run", trials=(), judged=False))
    assert [each.title for each in subject.sections] == ["The search", "Where this comes from"]
    assert subject.notes == [
        "This search is not finished: 0 of 7 trials are made.",
        "No trial has succeeded yet, so there is nothing to draw.",
    ]


def test_a_damaged_search(tmp_path: Path) -> None:
    run = search(tmp_path / "run")
    (run / "tailor.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read(run)
    assert caught.value.problems[0].where == str(run / "tailor.json")
