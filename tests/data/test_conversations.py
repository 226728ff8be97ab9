"""Conversations as text: every form of a row, what a template makes of it, and how sequences are packed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.data.conversations import Conversation, Turns, answers_in, learn_turns, render, rows_of_messages
from intarsia.data.corpus import tokenize
from intarsia.data.self_text import Sampling, self_corpus
from intarsia.data.sources import documents
from intarsia.errors import UserError
from intarsia.progress import Progress, reporting_to
from tests import families

SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
TALK = "<|user|>Hi</s><|assistant|>Yes</s>"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
# As the one of the tiny tokenizer, with a system turn, tools and calls.
TEMPLATE = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
    "{{ m.content }}</s>{% endfor %}"
)


NO_COLUMN = (
    r"(?s)a\.jsonl:1: expected messages, a question and its answer, a column `text`, or one string column; found "
)


def _jsonl(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _written(spec: str, template: str | None = TEMPLATE) -> list[str]:
    """The texts of a source, as the tiny tokenizer's template writes them."""
    tokenizer = families.make_tokenizer()
    tokenizer.chat_template = template
    found = []
    for document in documents(spec):
        assert isinstance(document, Conversation)
        found.append(render(document, tokenizer))
    return found


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": SAID, "text": "other"}, TALK),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, TALK),
        ({"prompt": "Hi", "response": "Yes", "id": "x"}, TALK),
        ({"prompt": SAID[:1], "completion": SAID[1:]}, TALK),
        ({"instruction": "Hi", "input": "", "output": "Yes"}, TALK),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "<|user|>Add\n\n1 2</s><|assistant|>3</s>"),
        ({"system": "Be", "prompt": "Hi", "response": "Yes"}, "<|system|>Be</s>" + TALK),
        ({"messages": [{"role": "system", "content": "Be"}, *SAID]}, "<|system|>Be</s>" + TALK),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, "i"]}, SAID[1]]}, TALK),
        (
            {
                "messages": [
                    {"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in SAID
                ]
            },
            TALK,
        ),
        (
            {
                "messages": [SAID[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}],
                "tools": [{"type": "function", "function": {"name": "add"}}],
            },
            "[add]<|user|>Hi</s><|assistant|>add(1)</s>",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
                    {"role": "function", "content": "3"},
                ],
                "tools": '[{"function": {"name": "f"}}]',
            },
            "[f]<|assistant|>add(2)</s><|tool|>3</s>",
        ),
    ],
)
def test_every_form_of_a_row(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    """The same from JSON lines, compressed lines, an array, and Parquet, where fields that a row lacks are None."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    spec = _jsonl(tmp_path / "a.jsonl", record)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(Path(spec).read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert _written(spec) == _written(f"{spec}.gz") == _written(str(tmp_path / "a.json")) == [expected]
    if len({type(each.get("content") or "") for each in record.get("messages", ())}) < 2:  # a column has one type
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
        assert _written(str(tmp_path / "a.parquet")) == [expected]


def test_a_hub_data_set_of_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    _jsonl(tmp_path / "set" / "train.jsonl", {"id": "a", "messages": SAID})
    assert _written(f"hub:{tmp_path / 'set'}:train") == _written(f"hub:{tmp_path / 'set'}:train:messages") == [TALK]


def test_a_column_may_be_named(tmp_path: Path) -> None:
    spec = _jsonl(tmp_path / "a.jsonl", {"messages": SAID, "text": "plain", "chosen": SAID[:1]})
    assert list(documents(f"{spec}#column=text")) == ["plain"]
    assert _written(f"{spec}#column=chosen") == ["<|user|>Hi</s>"]


def test_without_a_template_speakers_are_named_and_it_is_said(tmp_path: Path) -> None:
    spec = _jsonl(tmp_path / "a.jsonl", *[{"messages": SAID}] * 9)
    tokenizer, said = families.make_tokenizer(), list[str]()

    class Said(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    with reporting_to(Said()):
        corpus = tokenize(documents(spec), tokenizer, tokens=48, seq_len=48, shuffle=False, description="talks")
    assert tokenizer.decode(corpus.input_ids[0]).startswith("User: Hi\n\nAssistant: Yes</s>User: Hi\n\n")
    assert said == ["talks: conversations (column messages), formatted with speakers' names, without a chat template"]
    with reporting_to(Said()):
        tokenize(
            documents(spec), families.make_tokenizer(chat=True), tokens=48, seq_len=48, shuffle=False, description="b"
        )
    assert said[1:] == ["b: conversations (column messages), formatted with the model's chat template"]


def test_sequences_begin_with_a_conversation_and_nothing_is_put_between() -> None:
    tokenizer = families.make_tokenizer(chat=True)

    def talk(question: str) -> Conversation:
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": "ok"})
        return Conversation(messages=messages, where="here", columns="messages")

    whole = tokenizer("<|user|>zz</s><|assistant|>ok</s>")["input_ids"]
    size = len(whole)
    # Two and a half of them fill a sequence; the rest of the third is left out.
    corpus = tokenize([talk("zz")] * 9, tokenizer, tokens=1000, seq_len=2 * size + size // 2, shuffle=False, least=3)
    assert len(corpus) == 3 and corpus.mask is None and corpus.documents == 9
    for row in corpus.input_ids.tolist():
        assert row == [*whole, *whole, *whole[: size // 2]]
    drawn = tokenize([talk("a" * n) for n in range(1, 9)], tokenizer, tokens=4 * 40, seq_len=40, shuffle=True, least=1)
    start = tokenizer("<|user|>")["input_ids"]
    assert all(row[: len(start)] == start for row in drawn.input_ids.tolist())


def test_which_tokens_are_the_assistants() -> None:
    tokenizer = families.make_tokenizer(chat=True)
    turns = learn_turns(tokenizer)
    assert turns is not None
    text = "<|user|>why</s><|assistant|>because</s><|user|>so</s><|assistant|>ye"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = answers_in(ids, turns)[0]
    assert tokenizer.decode(ids[0][found]) == "because</s>ye"
    assert not answers_in(ids[:, :1], turns).any()


def test_what_a_model_wrote_can_be_read_again(tmp_path: Path) -> None:
    """Self-written conversations as messages, and these as the same tokens, with the last turn truncated as before."""
    model, tokenizer = families.make_model("llama"), families.make_tokenizer(chat=True)
    corpus = self_corpus(
        model, tokenizer, n=3, seq_len=64, seed=0, sampling=Sampling(longest_question=7, longest_answer=9)
    )
    turns = learn_turns(tokenizer)
    rows = list(rows_of_messages(corpus.input_ids, tokenizer, turns))
    assert [message["role"] for message in rows[0]["messages"][:3]] == ["user", "assistant", "user"]
    first = rows[0]["messages"][0]["content"]
    assert isinstance(turns, Turns)
    assert tokenizer.decode(corpus.input_ids[0]).startswith(f"<|user|>{first}</s><|assistant|>")
    texts = list(rows_of_messages(corpus.input_ids, tokenizer, None))
    assert texts[0] == {"text": tokenizer.decode(corpus.input_ids[0], skip_special_tokens=True)}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": "a", "meta": {}, "n": 1, "note": "b"}], NO_COLUMN + r"the string columns id, note\..*#column=NAME"),
        ([{"n": 1, "meta": {}}], NO_COLUMN + r"no string column \(columns: n, meta\)"),
        (
            [{"messages": SAID}, {"messages": [{"role": "narrator", "content": "x"}]}],
            r"a\.jsonl:2, message 1: expected a role: system, user, assistant or tool; found 'narrator'",
        ),
        ([{"messages": [{"role": "user"}]}], r"a\.jsonl:1, message 1: expected content; found the keys role"),
        ([{"messages": SAID}, {"messages": "Hi"}], None),
        ([{"messages": [*SAID, "Hi"]}], r"a\.jsonl:1, message 3: expected an object with role and content"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
            "message 1: expected parts of text; found a part of type 'image'",
        ),
        ([{"messages": SAID}, {"other": 1}], r"a\.jsonl:2: expected a column 'messages'; found the columns other"),
        (
            [{"prompt": "a", "response": ""}, {"prompt": "b", "response": None}],
            r"a\.jsonl: expected answers in column 'response'; found none\.",
        ),
        ([{"messages": SAID, "tools": "{"}], "a JSON list in column 'tools'"),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], "lone surrogate"),
    ],
)
def test_bad_rows(tmp_path: Path, records: list[Any], message: str | None) -> None:
    spec = _jsonl(tmp_path / "a.jsonl", *records)
    if message is None:  # text where others have messages is text
        assert [isinstance(each, Conversation) for each in documents(spec)] == [True, False]
        return
    with pytest.raises(UserError, match=message):
        list(documents(spec))


def test_a_template_that_refuses_a_row(tmp_path: Path) -> None:
    spec = _jsonl(tmp_path / "a.jsonl", {"messages": SAID}, {"messages": SAID[1:]})
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}x"
    with pytest.raises(
        UserError, match=r"a\.jsonl:2: .* chat template refuses this conversation \(roles must alternate\)\."
    ):
        _written(spec, refusing)
