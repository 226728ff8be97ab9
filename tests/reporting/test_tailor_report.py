"""What a report shows of a search over a family."""

from __future__ import annotations

from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.reporting.blocks import Figure, Pictures, Section, Subject, Table
from intarsia.reporting.page import report_html
from intarsia.reporting.tailor_report import read
from tests.reporting.runs import search


def section(subject: Subject, title: str) -> Section:
    return next(each for each in subject.sections if each.title == title)


def tables(found: Section) -> list[list[dict[str, str]]]:
    return [
        [{name: row.get(name, "") for name in block.columns} for row in block.rows]
        for block in found.blocks
        if isinstance(block, Table)
    ]


def test_the_front(tmp_path: Path) -> None:
    subject = read(search(tmp_path / "run"))
    assert subject.title == "demo + math, 6 → 4 layers"
    tiles = {tile.name: (tile.before, tile.now, tile.change) for tile in subject.tiles}
    assert tiles["trials"] == ("", "7", "of about 10^12 candidates")
    assert tiles["trials of the front"] == ("", "3", "trial 1 is the knee")
    assert tiles["science, least cost"] == ("1", "1.2", "+20.0% against the base model")
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
        "origin": "crossover",
    }
    (figure,) = [block for block in found.blocks if isinstance(block, Figure)]
    assert figure.caption == "prose against science, at 12 examples. Outside the chart: 1 trials."
    # One of the other trials, two of the front, the knee and the base model.
    assert figure.svg.count("<title>trial") == 4 and figure.svg.count("<title>the base model") == 1
    assert "trial 6" not in figure.svg


def test_final_scores(tmp_path: Path) -> None:
    found = section(read(search(tmp_path / "run")), "Final scores")
    (rows,) = tables(found)
    assert rows[1] == {
        "model": "incumbent",
        "layers": "4",
        "science": "1.25 ± 0.04",
        "science, accuracy": "40.0% ± 2.0%",
        "accuracy kept": "80.0%",
    }
    assert rows[0]["accuracy kept"] == ""
    assert "40 of science" in found.intro and "There are no unseen examples of prose" in found.intro


def test_the_puzzle_of_the_knee(tmp_path: Path) -> None:
    found = section(read(search(tmp_path / "run")), "The puzzle")
    board = found.blocks[0]
    assert isinstance(board, Pictures)
    assert board.summary.startswith(
        "Trial 1, the knee of the front. 4 layers: 1 of base, 1 of math, 1 merged, 1 joined"
    )
    assert board.data["depths"]["4"][3]["parts"] == [{"layer": 5, "wood": 1, "variant": "math"}]
    (rows,) = tables(found)
    assert [row["made of"] for row in rows] == [
        "base:0, whole",
        "task_arithmetic of 0.3 × math:1; output times 0.9",
        "base:3 (KV groups 1, channels 3) + math:4 (KV groups 1, channels 1)",
        "math:5, whole",
    ]
    captions = [block.caption for block in found.blocks if isinstance(block, Figure)]
    assert [caption.partition(" 2 of")[0] for caption in captions] == [
        "Trial 2, the best in science. 4 layers: 4 of base.",
        "Trial 4, the best in prose. 4 layers: 4 of base.",
    ]
    assert board.members == ["base", "math"]


def test_the_search(tmp_path: Path) -> None:
    subject = read(search(tmp_path / "run", wanted=20))
    found = section(subject, "The search")
    (rows,) = tables(found)
    assert [(row["engine"], row["examples"], row["trials"], row["failed"]) for row in rows] == [
        ("evolve", "4", "1", "0"),
        ("evolve", "12", "5", "1"),
        ("smac", "12", "1", "0"),
    ]
    (figure,) = [block for block in found.blocks if isinstance(block, Figure)]
    assert "base model" in figure.svg
    assert subject.notes[0] == "This search is not finished: 7 of 20 trials are done."
    assert subject.notes[1].startswith("Failed trials, without a cost: 1 (NaN in <prose>).")


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    page = report_html([search(tmp_path / "run")])
    assert "intarsia build run --best prose -o OUT" in page
    assert "&lt;the base&gt;" in page and "NaN in &lt;prose&gt;" in page and "<prose>" not in page


def test_a_search_without_trials(tmp_path: Path) -> None:
    subject = read(search(tmp_path / "run", trials=(), evaluated=False))
    assert [each.title for each in subject.sections if each.blocks] == ["How to reproduce it"]
    assert subject.notes == [
        "This search is not finished: 0 of 7 trials are done.",
        "No trial has succeeded yet, so there is nothing to draw.",
    ]


def test_a_damaged_search(tmp_path: Path) -> None:
    run = search(tmp_path / "run")
    (run / "tailor.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read(run)
    assert str(run / "tailor.json") in str(caught.value)
