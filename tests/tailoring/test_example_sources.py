"""Objectives from files, texts and lm-eval, and every mistake at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import UserError
from intarsia.evaluation.likelihood import Request, encode_pairs
from intarsia.evaluation.task_file import Question
from intarsia.evaluation.tasks import load_tasks
from intarsia.tailoring.family_file import ObjectiveSpec
from intarsia.tailoring.objective import Objective, questions_of, read_objectives
from tests import families

WORDS = families.sample_text(400, seed=3).split()


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def quiz(n: int = 10) -> list[dict[str, Any]]:
    """Questions of three choices, the right one going round."""
    return [
        {"query": " ".join(WORDS[at : at + 5]), "choices": WORDS[at + 5 : at + 8], "gold": at % 3} for at in range(n)
    ]


def read(*specs: ObjectiveSpec, seed: int = 0, windows: int = 12, seq_len: int = 16) -> tuple[Objective, ...]:
    return read_objectives(
        specs,
        families.make_tokenizer(),
        windows=windows,
        seq_len=seq_len,
        max_length=families.POSITIONS,
        seed=seed,
    )


def test_questions_and_their_part(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "quiz.jsonl", quiz())
    spec = ObjectiveSpec(name="quiz", task=file, split=(0.0, 0.33), metric="accuracy")
    (found,) = read(spec)
    assert (found.name, found.measure, found.source) == ("quiz", "accuracy", f"{file}#0:0.33")
    questions = [Question(query=q["query"], choices=tuple(q["choices"]), gold=q["gold"]) for q in quiz()[:4]]
    pairs = [(question.query, " " + choice) for question in questions for choice in question.choices]
    expected = encode_pairs(pairs, families.make_tokenizer(), max_length=None, where="quiz")
    assert len(found.examples) == 4
    assert {example.gold for example in found.examples} == {0, 1, 2}
    by_request = {example.requests: example for example in found.examples}
    for number, question in enumerate(questions):
        example = by_request[expected[3 * number : 3 * number + 3]]
        assert example.gold == question.gold
        assert example.characters == tuple(len(choice) for choice in question.choices)


def test_targets(tmp_path: Path) -> None:
    records = [{"query": f"say {word}:", "target": f" {word} again"} for word in WORDS[:6]]
    file = write_lines(tmp_path / "cot.jsonl", records)
    (found,) = read(ObjectiveSpec(name="cot", loss=file, split=(0.5, 1.0)))
    tokenizer = families.make_tokenizer()
    texts = {tokenizer.decode([*e.requests[0].context, *e.requests[0].continuation]) for e in found.examples}
    assert texts == {f"say {word}: {word} again" for word in WORDS[3:6]}
    assert found.measure == "loss" and all(example.gold is None for example in found.examples)


def test_windows_of_a_text(text_file: Path) -> None:
    specs = (
        ObjectiveSpec(name="prose", loss=str(text_file)),
        ObjectiveSpec(name="near", kl=str(text_file), split=(0.0, 0.02)),
    )
    prose, near = read(*specs)
    assert len(prose.examples) == 12
    for example in prose.examples:
        (request,) = example.requests
        assert len(request.context) == 1 and len(request.continuation) == 15
    again, _ = read(*specs)
    assert again.sha256 == prose.sha256
    assert near.measure == "kl" and 1 <= len(near.examples) < 300
    # What a larger budget draws begins with what a smaller one has: the windows, if not their order.
    more, _ = read(*specs, windows=20)
    assert {example.requests for example in prose.examples} < {example.requests for example in more.examples}
    other, _ = read(*specs, seed=1)
    assert other.sha256 != prose.sha256


def test_a_short_text_gives_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(" ".join(WORDS[:60]))
    (found,) = read(ObjectiveSpec(name="short", loss=str(file)), windows=500)
    tokens = len(families.make_tokenizer()(file.read_text())["input_ids"])
    assert len(found.examples) == tokens // 16


def test_json_lines_with_texts_are_texts(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pages.jsonl", [{"text": " ".join(WORDS[:100])}, {"text": " ".join(WORDS[100:])}])
    (found,) = read(ObjectiveSpec(name="pages", loss=file), windows=3)
    assert [len(example.requests[0].continuation) for example in found.examples] == [15, 15, 15]


def test_every_mistake_at_once(tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [{"query": "a", "choices": ["b"], "gold": 0}])
    specs = (
        ObjectiveSpec(name="bad", task=bad),
        ObjectiveSpec(name="gone", loss=str(tmp_path / "gone.txt")),
        ObjectiveSpec(name="hub", loss="hub:some/data:train:text", split=(0.0, 0.5)),
    )
    with pytest.raises(UserError) as caught:
        read(*specs)
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == 3
    assert "bad.jsonl:1, choices" in found[0] and "gone.txt" in found[1] and "has a split" in found[2]


METRICS = "metric_list:\n  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true\n"


def write_task(folder: Path, name: str, records: list[dict[str, Any]], lines: str) -> None:
    data = write_lines(folder / f"{name}.jsonl", records)
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"  cache_dir: {folder / 'cache'}\ntest_split: test\n{lines}"
    )


def test_a_task_of_the_harness_is_the_same_as_its_file(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    write_task(
        tmp_path,
        "asked",
        quiz(),
        'output_type: multiple_choice\ndoc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{gold}}"\n' + METRICS,
    )
    (task,) = load_tasks(["asked"], include_path=tmp_path)
    found = questions_of(task, (0.0, 0.33))
    assert [(q.pairs, q.gold, q.characters, q.source) for q in found] == [
        (
            tuple((record["query"], " " + choice) for choice in record["choices"]),
            record["gold"],
            tuple(map(len, record["choices"])),
            "asked",
        )
        for record in quiz()[:4]
    ]


def test_a_task_of_the_harness_without_choices_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    write_task(
        tmp_path,
        "written",
        quiz(3),
        'output_type: generate_until\ndoc_to_text: "{{query}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n",
    )
    (task,) = load_tasks(["written"], include_path=tmp_path)
    with pytest.raises(UserError, match=r"needs multiple choice .* task written is a task of type generate_u"):
        questions_of(task, (0.0, 1.0))


def test_requests_are_of_the_tokenizer(tmp_path: Path) -> None:
    """White space between query and choice counts to the choice, as it does to lm-eval."""
    file = write_lines(tmp_path / "one.jsonl", [{"query": "ab", "choices": ["c", "d"], "gold": 0}])
    (found,) = read(ObjectiveSpec(name="one", task=file))
    encode = families.make_tokenizer().encode
    assert found.examples[0].requests == tuple(
        Request(context=tuple(encode("ab")), continuation=tuple(encode(f" {choice}"))) for choice in "cd"
    )
