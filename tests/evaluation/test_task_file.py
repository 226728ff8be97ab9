from __future__ import annotations

import json
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.evaluation.task_file import Question, Target, names_a_file, read_items


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def good(number: int) -> dict[str, object]:
    return {"query": f"question {number}", "choices": ["yes", "no"], "gold": number % 2, "source": "kept out"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "quiz.jsonl"
    file.write_text(lines(*map(good, range(10))))
    return file


def test_questions_in_order(path: Path) -> None:
    name, questions = read_items(str(path), Question)
    assert name == "quiz"
    assert questions[3] == Question(query="question 3", choices=("yes", "no"), gold=1)
    assert [question.query for question in questions] == [f"question {i}" for i in range(10)]


def test_parts_share_nothing_and_lose_nothing(path: Path) -> None:
    name, first = read_items(f"{path}#0:0.33", Question)
    assert name == "quiz#0:0.33"
    _, rest = read_items(f"{path}#0.33:1", Question)
    assert [q.query for q in first] == [f"question {i}" for i in range(4)]
    assert first + rest == read_items(str(path), Question)[1]
    assert read_items(f"{path}#0.33:1", Question, limit=2)[1] == rest[:2]
    assert read_items(str(path), Question, limit=100)[1] == first + rest


def test_what_is_a_file() -> None:
    assert names_a_file("quiz.jsonl") and names_a_file("../a/quiz.JSONL#0:0.5")
    assert not names_a_file("arc_easy") and not names_a_file("quiz.json")


def test_a_file_of_the_very_name(tmp_path: Path) -> None:
    odd = tmp_path / "a#b.jsonl"
    odd.write_text(lines(good(1)))
    assert read_items(str(odd), Question)[0] == "a#b"


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    records = [
        good(0),
        {"query": "q", "choices": ["a", "b"], "gold": 2},
        {"query": "q", "choices": ["a", "b"], "gold": -1},
        {"query": "q", "choices": ["a", "b"], "gold": True},
        {"query": "q", "choices": ["a"], "gold": 0},
        {"query": "q", "choices": ["a", " "], "gold": 0},
        {"query": " ", "choices": ["a", "b"], "gold": 0},
        {"question": "q", "choices": ["a", "b"], "gold": 0},
        ["not", "an", "object"],
    ]
    file.write_text(lines(*records) + "\n{broken\n")
    with pytest.raises(UserError) as raised:
        read_items(str(file), Question)
    found = [problem.message.removeprefix(str(file)).partition(": ") for problem in raised.value.problems]
    assert [place for place, _, _ in found] == [
        ":2",
        ":3, gold",
        ":4, gold",
        ":5, choices",
        ":6, choices, 1",
        ":7, query",
        ":8, query",
        ":9",
        ":11",
    ]
    said = {place: message for place, _, message in found}
    assert said[":2"] == "gold is 2, but there are 2 choices."
    assert said[":7, query"] == "text is blank."
    assert said[":8, query"] == "Field required."
    assert "JSON" in said[":11"]


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("x\n" * 50)
    with pytest.raises(UserError) as raised:
        read_items(str(file), Question)
    assert len(raised.value.problems) == 21
    assert raised.value.problems[-1].message == f"{file} has 30 more problems."


@pytest.mark.parametrize(
    ("content", "spec", "limit", "found"),
    [
        (b"", "", None, "is empty"),
        (b"\n \n", "", None, "is empty"),
        (lines(good(0), good(1)).encode(), "#0.6:1", None, "none of the 2 items"),
        (b"\xff\xfe", "", None, "byte 0xff at offset 0"),
        (lines(good(0)).encode(), "#0.5", None, "'0.5'"),
    ],
)
def test_files_without_items(tmp_path: Path, content: bytes, spec: str, limit: int | None, found: str) -> None:
    file = tmp_path / "quiz.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_items(f"{file}{spec}", Question, limit=limit)
    assert found in raised.value.problems[0].message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_items(str(tmp_path / "none.jsonl"), Question)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_items(str(tmp_path / "folder.jsonl"), Question)


def test_targets(tmp_path: Path) -> None:
    file = tmp_path / "cot.jsonl"
    file.write_text(lines({"query": "q", "target": " t"}, {"query": "r", "target": " u"}))
    assert read_items(str(file), Target, limit=1) == ("cot", (Target(query="q", target=" t"),))
    file.write_text(lines({"query": "q", "target": ""}, {"query": "r"}))
    with pytest.raises(UserError) as raised:
        read_items(str(file), Target)
    places = [problem.message.removeprefix(str(file)).partition(": ")[0] for problem in raised.value.problems]
    assert places == [":1, target", ":2, target"]
