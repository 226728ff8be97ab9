"""Rows of data sets as conversations: which columns hold one, and its messages in the one form that templates take.

A row is a list of messages (`messages`; `conversations` with from/value), or a question and an answer (`prompt` and
`response`, `instruction` with `input` and `output`, ...), or plain text. `content` is a string or a list of text parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from intarsia.errors import UserError

_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "answer"),
)
_BESIDE = ("system", "tools", "input", "context")
_ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool", "ipython")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
_NAMES = {"ipython": "tool", "developer": "system"}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The messages of one row."""

    messages: tuple[Mapping[str, Any], ...]
    # Tools that the assistant may call, as JSON schemas; None without.
    tools: tuple[Any, ...] | None = None
    # The row, for errors.
    where: str
    # The columns that it was read from.
    columns: str

    @property
    def size(self) -> int:
        """Its characters."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def question(self) -> str:
        """What the user says last."""
        return next((each["content"] for each in reversed(self.messages) if each["role"] == "user"), "")

    def plain(self) -> str:
        """Speaker and words, for a model without a chat template."""
        lines = []
        for message in self.messages:
            calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
            words = "\n".join(filter(None, [message["content"].strip(), *calls]))
            role = _NAMES.get(message["role"], message["role"]).capitalize()
            lines.append(f"{role}: {words}")
        return "\n\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a data set that are read: one of text or messages, or a question and its answer."""

    question: str
    answer: str | None = None

    @classmethod
    def found(cls, where: str, kinds: Mapping[str, str]) -> Columns:
        """Choose the columns of a data set.

        Args:
            where: names the data set in errors.
            kinds: every column with what it holds: `text`, `messages`, or anything else.

        Raises:
            UserError: no column can be used.
        """
        for name in _LISTS:
            if kinds.get(name) == "messages":
                return cls(question=name)
        for question, answer in _PAIRS:
            if {kinds.get(question), kinds.get(answer)} <= {"text", "messages"}:
                return cls(question=question, answer=answer)
        strings = [name for name, kind in kinds.items() if kind == "text"]
        if "text" in strings or len(strings) == 1:
            return cls(question="text" if "text" in strings else strings[0])
        rest = ", ".join(name for name in kinds if name not in strings) or "none"
        found = f"the string columns {', '.join(strings)}" if strings else f"no string column (columns: {rest})"
        raise row_error(
            where,
            "messages, a question and its answer, a column `text`, or one string column",
            found,
            "Name the column: FILE#column=NAME",
        )

    @classmethod
    def of_record(cls, where: str, record: Mapping[str, Any]) -> Columns:
        """The same, from the values of a row."""
        return cls.found(where, {name: _kind(value) for name, value in record.items()})

    def read_from(self, names: Sequence[str]) -> list[str]:
        """Those of a data set's columns that are needed."""
        needed = {self.question, self.answer, *_BESIDE}
        return [name for name in names if name in needed]

    @property
    def words(self) -> str:
        """For a person."""
        return self.question if self.answer is None else f"{self.question} and {self.answer}"

    def read(self, record: Mapping[str, Any], where: str) -> str | Conversation:
        """A row as text or as a conversation; an empty text where the row, or its answer, is empty.

        Raises:
            UserError: a column is missing, or holds something else.
        """
        question = _value(record, self.question, where)
        if self.answer is None and not _is_messages(question):
            return _text(question or None, where, self.question)
        messages = [*_system(record, where), *self._turns(question, record, where, self.question, "user")]
        if self.answer is not None:
            answer = self._turns(_value(record, self.answer, where), record, where, self.answer, "assistant")
            if not any(message["content"].strip() or "tool_calls" in message for message in answer):
                return ""
            messages += answer
        if not any(message["content"].strip() for message in messages):
            return ""
        tools = _tools(record.get("tools"), where)
        return Conversation(messages=tuple(messages), tools=tools, where=where, columns=self.words)

    def _turns(
        self, value: Any, record: Mapping[str, Any], where: str, column: str, role: str
    ) -> list[Mapping[str, Any]]:
        if _is_messages(value):
            return [_message(each, f"{where}, message {number}") for number, each in enumerate(value, start=1)]
        text = _text(value, where, column)
        if role == "user":
            more = next((record[name] for name in ("input", "context") if isinstance(record.get(name), str)), "")
            text = "\n\n".join(filter(None, [text, more.strip()]))
        return [{"role": role, "content": text}]


def row_error(where: str, expected: str, found: str, remedy: str) -> UserError:
    """An error in a text source or one of its rows."""
    return UserError(f"text source {where}: expected {expected}; found {found}.", remedy)


def missing_column(where: str, column: str, columns: Sequence[str]) -> UserError:
    """An error: a column that is not there."""
    found = f"the columns {', '.join(columns) or '(none)'}"
    return row_error(where, f"a column {column!r}", found, "Name one of these.")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _kind(value: Any) -> str:
    if _is_messages(value):
        return "messages"
    return "text" if isinstance(value, str) else type(value).__name__


def _value(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in record:
        raise missing_column(where, column, list(record))
    return record[column]


def _text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        found = f"a {type(value).__name__}"
        raise row_error(where, f"text in column {column!r}", found, "Name a column that holds text.")
    return _valid(value, where)


def _valid(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise row_error(where, "text", "a lone surrogate (\\ud800 to \\udfff)", "Correct this record.") from None
    return text


def _system(record: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    text = record.get("system")
    return [{"role": "system", "content": _valid(text, where)}] if isinstance(text, str) and text.strip() else []


def _tools(given: Any, where: str) -> tuple[Any, ...] | None:
    """The tools of a row: a list, or a list written as JSON."""
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except ValueError:
            raise row_error(where, "a JSON list in column 'tools'", repr(given[:60]), "Correct this row.") from None
    return tuple(_bare(each) for each in given) or None if isinstance(given, list) else None


def _message(given: Any, where: str) -> Mapping[str, Any]:
    """A message with `role` and `content`, and whatever else it has that a template may read."""
    if not isinstance(given, Mapping):
        raise row_error(where, "an object with role and content", repr(given)[:60], "Correct this row.")
    named = given.get("role") or given.get("from")
    role = _ROLES.get(str(named).lower())
    if role is None:
        known = "a role: system, user, assistant or tool"
        raise row_error(where, known, f"{named!r}", "Rename it, or leave this row out.")
    content = next((given[name] for name in ("content", "value", "text") if given.get(name) is not None), None)
    own = ("role", "from", "content", "value", "text")
    rest = {name: _bare(value) for name, value in given.items() if name not in own and value is not None}
    if calls := rest.get("tool_calls"):
        rest["tool_calls"] = [_call(call, where) for call in calls]
    else:
        rest.pop("tool_calls", None)
    if content is None and "tool_calls" not in rest:
        raise row_error(where, "content", f"the keys {', '.join(given)}", "Correct this row.")
    return {"role": role, "content": _content(content, where), **rest}


def _content(given: Any, where: str) -> str:
    """Text, or the text of all parts."""
    if isinstance(given, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in given]
        for part in parts:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise row_error(where, "parts of text", f"a part of type {kind!r}", "Leave this row out.")
        given = "".join(part["text"] for part in parts)
    if not isinstance(given, str | None):
        raise row_error(where, "content as text", f"a {type(given).__name__}", "Correct this row.")
    return _valid(given or "", where)


def _call(given: Any, where: str) -> Any:
    """A call of a tool, with arguments as an object, as templates take them; they are often written as JSON text."""
    if not isinstance(given, Mapping):
        raise row_error(where, "tool calls as objects", repr(given)[:60], "Correct this row.")
    call = dict(given)
    if isinstance(call.get("function"), Mapping):
        call["function"] = _call(call["function"], where)
    elif isinstance(call.get("arguments"), str):
        with suppress(ValueError):  # some are plain text
            call["arguments"] = json.loads(call["arguments"])
    return call


def _bare(value: Any) -> Any:
    """A value without fields that are None: Parquet gives every struct the fields of all."""
    if isinstance(value, Mapping):
        return {name: _bare(each) for name, each in value.items() if each is not None}
    return [_bare(each) for each in value] if isinstance(value, list) else value
