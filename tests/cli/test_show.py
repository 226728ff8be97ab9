"""Results as tables."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from intarsia.cli.main import show
from intarsia.reporting.wording import text_of


class Answer:
    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def to_dict(self) -> dict[str, Any]:
        return self.data


def shown(data: dict[str, Any]) -> str:
    stream = io.StringIO()
    show(Answer(data), to=stream, as_json=False)
    return stream.getvalue()


def row(text: str, name: str) -> list[str]:
    """The cells of the table row that begins with a name."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.split("│")]


def test_a_compression_is_a_short_table() -> None:
    measures = {
        "parameters": 134515008,
        "bytes": 269030016,
        "perplexity": {"value": 28.2, "stderr": 0.51},
        "perplexity_without_heal": None,
        "accuracy": 0.42,
        "prefill_per_s": 1834.5,
        "decode_per_s": 61.2,
    }
    answers = {"agreement": {"value": 0.55, "stderr": 0.02}, "loops": {"value": 0.4, "stderr": 0.1}}
    healed = {"perplexity": {"value": 56.4, "stderr": 1.0}, "perplexity_without_heal": {"value": 93.1, "stderr": 2.0}}
    data: dict[str, Any] = {
        "model": "demo",
        "estimate": {"bytes": 1},
        "before": {"layers": 30, **measures},
        "after": {"layers": 25, **measures, "parameters": 116815008, **healed, **answers},
        "healed": {"gap_closed": 0.5},
        "evaluation": "text of the model's own, 64 windows of 512 tokens",
        "seconds": 271.0,
        "seconds_by_part": {"text": 12.2, "planning": 190, "healing": 40, "building": 0.1, "evaluation": 29},
        "report": "out/demo-25/report.html",
        "out": "out/demo-25",
    }
    text = shown(data)
    rows = {name: cells for name, *cells in (re.split(r" {2,}", line.strip()) for line in text.splitlines()[1:10])}
    assert rows["layers"] == ["30", "25", "-16.7%"]
    assert rows["parameters"] == ["134,515,008", "116,815,008", "-13.2%"]
    assert rows["size"] == ["269 MB", "269 MB", "+0.0%"]
    assert rows["perplexity"] == ["28.2 ± 0.51", "56.4 ± 1", "+100.0%"]
    assert rows["perplexity before healing"] == ["93.1 ± 2"]
    assert rows["agreement"] == ["0.55 ± 0.02"]
    assert rows["accuracy on tasks"] == ["0.42", "0.42", "+0.0%"]
    assert rows["tokens/s, prompt"] == ["1,834.5", "1,834.5", "+0.0%"]
    assert rows["tokens/s, writing"] == ["61.2", "61.2", "+0.0%"]
    lines = dict(line.split(maxsplit=1) for line in text.splitlines()[10:])
    assert lines["on"] == data["evaluation"] and lines["model"] == "out/demo-25"
    assert lines["time"] == "4 min 31 s (seconds: text 12, planning 190, healing 40, evaluation 29)"
    assert lines["try"].endswith('transformers.pipeline("text-generation", "out/demo-25")("Hello")')
    assert len(text.splitlines()) <= 15 and max(map(len, text.splitlines())) <= 80
    warned = shown({**data, "warning": "answers differ more than perplexity says: 55% of tokens agree, 40% loop"})
    assert "\nbut     answers differ more" in warned and "before healing" not in warned
    assert len(warned.splitlines()) == 15 and max(map(len, warned.splitlines())) <= 80
    # A model with a chat template is given messages; where there are too many lines, some measures are in the report.
    chat = shown({**data, "warning": "x", "chat_template": True})
    assert chat.splitlines()[-2].endswith('chat = transformers.pipeline("text-generation", "out/demo-25")')
    asked = "        chat([{'role': 'user', 'content': 'Hello'}])[0]['generated_text'][-1]"
    assert chat.splitlines()[-1] == asked and "tokens/s, writing" in chat and "size" in chat
    assert "before healing" not in chat and "tokens/s, prompt" not in chat
    assert len(chat.splitlines()) == 15 and max(map(len, chat.splitlines())) <= 80
    pushed = shown({**data, "warning": "x", "chat_template": True, "push": {"address": "hub/me/demo-25"}})
    assert len(pushed.splitlines()) == 15 and "size" not in pushed
    # Without speeds, tasks, healing and parts there is less.
    for measured in (data["before"], data["after"]):
        measured.update(dict.fromkeys(("accuracy", "prefill_per_s", "decode_per_s", "perplexity_without_heal")))
        measured.pop("agreement", None)
    assert len(shown({**data, "seconds_by_part": {}, "evaluation": None}).splitlines()) == 9


def test_lists_of_mappings_are_tables() -> None:
    text = shown({"ladder": [{"layers": 29, "loss": 3.25}, {"layers": 28, "loss": 3.5, "note": "a [b]"}]})
    assert row(text, "29") == ["29", "3.25", ""]
    assert row(text, "28") == ["28", "3.5", "a [b]"]


def test_a_long_path_in_a_pipe_stays_whole() -> None:
    path = "/a-folder" * 40
    assert path in shown({"paths": {"out": path}})


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("disk_bytes", 269_000_000, "269 MB"),
        ("bytes", 1_500, "1.5 kB"),
        ("bytes", 14_000_000_000, "14 GB"),
        ("seconds", 0.1234, "0.12 s"),
        ("wall_seconds", 125.0, "2 min 5 s"),
        ("decode_tokens_per_s", 1234.56, "1,234.6"),
        ("perplexity", 28.2468, "28.25"),
        ("resumed", True, "yes"),
        ("model", None, ""),
        ("kept", [3, 4], "3, 4"),
        ("settings", {"merge": 2, "dominance": None, "norm": "fold"}, "merge 2, norm fold"),
    ],
)
def test_values_as_a_person_reads_them(key: str, value: Any, text: str) -> None:
    assert text_of(key, value) == text


def test_json_refuses_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        show(Answer({"loss": float("nan")}), to=io.StringIO(), as_json=True)
