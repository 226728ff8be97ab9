"""Comparisons are read as they stand on disk, whole or not."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.reporting.comparison import as_csv, as_markdown, load
from intarsia.reporting.comparison_report import figure
from tests.reporting.runs import comparison, row, scores

SPEED = {"decode_tokens_per_s": 20.0, "prefill_tokens_per_s": 300.0}
ROWS = [
    row("dense", 30, "none", 29.5, tasks=scores(0.6), speed=SPEED),
    row("come", 27, "none", 50.0, tasks=scores(0.5), speed=SPEED, layer_forwards=31.5, plan_seconds=60.0),
    row("come", 27, "closed-form", 40.0),
    row("come", 25, "none", 70.0),
]


def test_rows_and_names(tmp_path: Path) -> None:
    found = load(comparison(tmp_path / "run", ROWS))
    assert [each.key for each in found.rows] == [
        ("dense", 30, "none"),
        ("come", 27, "none"),
        ("come", 27, "closed-form"),
        ("come", 25, "none"),
    ]
    assert found.dense is not None and found.dense.parameters == 30000
    assert (found.texts, found.tasks) == (("news",), ("piqa", "mine"))
    assert found.rows[2].name == "come, closed-form"
    assert found.rows[1].measure("piqa") == {"value": 0.5, "stderr": 0.02}
    assert found.rows[1].measure("mean") == {"value": 0.5, "stderr": None}  # one of the tasks has no error
    assert found.rows[1].measure("mine") == {"value": 0.5, "stderr": None}
    assert found.rows[2].measure("piqa") is None
    assert list(found.curves) == [("come", "none"), ("come", "closed-form")]


def test_error_of_the_mean_over_tasks(tmp_path: Path) -> None:
    both = [
        {"name": name, "primary": "acc", "metrics": {"acc": {"value": 0.5, "stderr": error}}}
        for name, error in (("a", 0.03), ("b", 0.04))
    ]
    found = load(comparison(tmp_path / "run", [row("come", 27, "none", 50.0, tasks={"mean": 0.5, "scores": both})]))
    assert found.rows[0].measure("mean") == {"value": 0.5, "stderr": pytest.approx(0.025)}


def test_a_line_that_is_cut_off_or_blank_does_not_count_and_a_later_one_wins(tmp_path: Path) -> None:
    path = comparison(tmp_path / "run", [*ROWS, row("come", 25, "none", 71.0)])
    with (path / "rows.jsonl").open("a") as file:
        file.write('\n{"method": "shortgpt", "layers": 2')
    found = load(path)
    assert len(found.rows) == 4
    assert found.rows[3].perplexity["news"]["value"] == 71.0


def test_what_is_still_to_come_is_known(tmp_path: Path) -> None:
    asked = {"methods": ["come", "sleb"], "layers": [27], "heal": ["none", "closed-form"], "speed": True}
    found = load(comparison(tmp_path / "run", ROWS, asked=asked))
    assert [key for key in found.asked if key not in {each.key for each in found.rows}] == [
        ("sleb", 27, "none"),
        ("sleb", 27, "closed-form"),
    ]


def test_nothing_measured_yet(tmp_path: Path) -> None:
    path = comparison(tmp_path / "run", [])
    (path / "rows.jsonl").unlink()
    assert load(path).rows == ()


@pytest.mark.parametrize("line", ["no json", '{"method": "come"}', "[1]", '{"method": "come", "layers": null}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = comparison(tmp_path / "run", ROWS)
    with (path / "rows.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 5"):
        load(path)


def test_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compare\.json"):
        load(tmp_path)
    (tmp_path / "compare.json").write_text("[]")
    with pytest.raises(UserError, match="a JSON object"):
        load(tmp_path)


def test_csv_holds_the_numbers(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(load(comparison(tmp_path / "run", ROWS))))))
    assert rows[1]["method"] == "come" and rows[1]["layers"] == "27"
    assert float(rows[1]["news"]) == 50.0 and float(rows[1]["news stderr"]) == 5.0
    assert float(rows[1]["decode tokens/s"]) == 20.0
    assert rows[3]["piqa"] == ""


def test_markdown_has_a_line_a_model(tmp_path: Path) -> None:
    lines = as_markdown(load(comparison(tmp_path / "run", ROWS))).splitlines()
    assert len(lines) == 2 + 4
    assert lines[0].startswith("| method | layers | heal |")
    assert "| 50.0 ± 5 |" in lines[3]


@pytest.mark.parametrize("against", ["parameters", "layers", "decode_tokens_per_s"])
@pytest.mark.parametrize("quality", ["news", "piqa", "mean"])
def test_figures(tmp_path: Path, against: str, quality: str) -> None:
    found = load(comparison(tmp_path / "run", ROWS))
    svg = figure(found, against=against, quality=quality)
    assert "dense" in svg and "come, 27 layers" in svg


def test_healed_points_are_hollow(tmp_path: Path) -> None:
    svg = figure(load(comparison(tmp_path / "run", ROWS)), against="layers", quality="news")
    hollow = re.findall(r'<use (?![^>]*fill="var)[^>]*stroke="var\(--s0\)"[^>]*><title>(.*?)</title>', svg)
    assert hollow == ["come, closed-form, 27 layers: 40"]
    assert "dashed, hollow: healed" in svg


def test_a_model_that_is_none_any_more_does_not_stretch_the_figure(tmp_path: Path) -> None:
    broken = row("laco", 27, "none", 3.2e7)
    broken["perplexity"]["news"]["stderr"] = 1.7e6
    found = load(comparison(tmp_path / "run", [*ROWS, broken]))
    drawn = figure(found, quality="news")
    assert "laco, 27 layers: 3.2e+07" in drawn and drawn.count("↑") == 1
    assert "arrow: more than 30 times the original's" in drawn
    assert "10M" not in drawn and "1M" not in drawn
    assert "arrow" not in figure(load(comparison(tmp_path / "other", ROWS)), quality="news")
    assert "| 3.2e+07 ± 1.7e+06 |" in as_markdown(found)
