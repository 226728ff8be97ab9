"""Conversations: their columns in a data set, their messages in one form, and their text by a chat template.

A row is a list of messages (`messages`; `conversations` with from/value), or a question and an answer (`prompt` and
`response`, `instruction` with `input` and `output`, ...), or plain text. `content` is a string or a list of text parts.

No particular template is assumed: its form of turns is learnt by rendering marked messages, as the text before, between
and after the marks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
_MARKS = ("Zq1", "Zq2", "Zq3")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The messages of one row."""

    messages: tuple[Mapping[str, Any], ...]
    # Tools that the assistant may call, as JSON schemas; None without any.
    tools: tuple[Any, ...] | None = None
    # The row's name in errors.
    where: str
    # The columns it was read from.
    columns: str

    @property
    def size(self) -> int:
        """Number of characters."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def question(self) -> str:
        """The user's last message."""
        return next((each["content"] for each in reversed(self.messages) if each["role"] == "user"), "")

    def plain(self) -> str:
        """The text with speakers' names, for a model without a chat template."""
        lines = []
        for message in self.messages:
            calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
            words = "\n".join(filter(None, [message["content"].strip(), *calls]))
            role = _NAMES.get(message["role"], message["role"]).capitalize()
            lines.append(f"{role}: {words}")
        return "\n\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a data set to read: one of text or messages, or a question and its answer."""

    question: str
    answer: str | None = None

    @classmethod
    def found(cls, where: str, kinds: Mapping[str, str]) -> Columns:
        """Choose the columns of a data set.

        Args:
            where: the data set's name in errors.
            kinds: the content of every column: `text`, `messages`, or anything else.

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
        """Choose the columns from the values of a row."""
        return cls.found(where, {name: _kind(value) for name, value in record.items()})

    def read_from(self, names: Sequence[str]) -> list[str]:
        """The needed columns of a data set."""
        needed = {self.question, self.answer, *_BESIDE}
        return [name for name in names if name in needed]

    @property
    def words(self) -> str:
        """The columns in words."""
        return self.question if self.answer is None else f"{self.question} and {self.answer}"

    def read(self, record: Mapping[str, Any], where: str) -> str | Conversation:
        """A row as text or as a conversation; an empty text if the row, or its answer, is empty.

        Raises:
            UserError: a column is missing, or holds something else.
        """
        question = _value(record, self.question, where)
        if self.answer is None and not _is_messages(question):
            return _text(question or None, where, self.question)
        messages = self._turns(question, record, where, self.question, "user")
        if isinstance(system := record.get("system"), str) and system.strip():
            messages = [{"role": "system", "content": _valid(system, where)}, *messages]
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
    """The error for a missing column."""
    found = f"the columns {', '.join(columns) or '(none)'}"
    return row_error(where, f"a column {column!r}", found, "Give one of these.")


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
        raise row_error(where, f"text in column {column!r}", found, "Give a column that holds text.")
    return _valid(value, where)


def _valid(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON allows half of a surrogate pair, which no tokenizer accepts
        raise row_error(where, "text", "a lone surrogate (\\ud800 to \\udfff)", "Correct this record.") from None
    return text


def _tools(given: Any, where: str) -> tuple[Any, ...] | None:
    """The tools of a row: a list, or JSON text of one."""
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except ValueError:
            raise row_error(where, "a JSON list in column 'tools'", repr(given[:60]), "Correct this row.") from None
    return tuple(_bare(each) for each in given) or None if isinstance(given, list) else None


def _message(given: Any, where: str) -> Mapping[str, Any]:
    """A message with `role` and `content`, and other keys that a template may read."""
    if not isinstance(given, Mapping):
        raise row_error(where, "an object with role and content", repr(given)[:60], "Correct this row.")
    named = given.get("role") or given.get("from")
    role = _ROLES.get(str(named).lower())
    if role is None:
        known = "a role: system, user, assistant or tool"
        raise row_error(where, known, f"{named!r}", "Rename it, or remove this row.")
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
                raise row_error(where, "parts of text", f"a part of type {kind!r}", "Remove this row.")
        given = "".join(part["text"] for part in parts)
    if not isinstance(given, str | None):
        raise row_error(where, "content as text", f"a {type(given).__name__}", "Correct this row.")
    return _valid(given or "", where)


def _call(given: Any, where: str) -> Any:
    """A tool call with arguments as an object, as templates expect them; they are often JSON text."""
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
    """A value without fields that are None, because Parquet gives every struct the fields of all."""
    if isinstance(value, Mapping):
        return {name: _bare(each) for name, each in value.items() if each is not None}
    return [_bare(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Token ids around the turns of a conversation.

    `opening` comes before the first user turn (with the template's own system text, if any);
    `to_assistant` between a user turn and the answer; `to_user` between an answer and the next user turn; `enders` are
    the tokens that end a turn when the model writes them.
    """

    opening: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    enders: frozenset[int]


def learn_turns(tokenizer: Any) -> Turns | None:
    """The turns of a tokenizer's chat template; None if it has none, or they cannot be learnt.

    They cannot be learnt if the template refuses such a conversation, or omits a message of it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    user, answer, again = _MARKS
    talk = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": again},
    ]
    try:
        whole = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=False)
        asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise anything
        return None
    if any(whole.count(mark) != 1 for mark in _MARKS) or asked.count(user) != 1:
        return None
    opening, rest = whole.split(user)
    to_user = rest.split(answer)[1].split(again)[0] if whole.index(answer) < whole.index(again) else ""
    texts = opening, asked.split(user)[1], to_user
    opened, to_assistant, to_user_ids = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    )
    if not (opened and to_assistant and to_user_ids):
        return None
    enders = {to_assistant[0], to_user_ids[0]}
    if tokenizer.eos_token_id is not None:
        enders.add(tokenizer.eos_token_id)
    return Turns(opening=opened, to_assistant=to_assistant, to_user=to_user_ids, enders=frozenset(enders))


def render(conversation: Conversation, tokenizer: Any, *, ask: bool = False) -> str:
    """A conversation in the form of the tokenizer's chat template.

    Args:
        ask: end where the assistant's answer begins.

    Raises:
        UserError: the template refuses it.
    """
    tools = None if conversation.tools is None else [dict(tool) for tool in conversation.tools]
    messages = [dict(message) for message in conversation.messages]
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template may raise anything
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{conversation.where}: the model's chat template refuses this conversation ({said}).",
            "Correct or remove such rows, or use a text column: FILE#column=NAME.",
        ) from error
    return text


def prompt_of(given: str | Conversation, tokenizer: Any, *, where: str = "a prompt") -> tuple[str, bool]:
    """A question, or a conversation up to its last question, as a prompt; and whether it lacks special tokens, because
    the model has no chat template.

    Args:
        where: the name of a question in errors; a conversation knows its row.

    Raises:
        UserError: the template refuses it, or it has no user message.
    """
    template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(given, str):
        if not template:
            return given, True
        given = Conversation(messages=({"role": "user", "content": given},), where=where, columns="")
    asked = [number for number, message in enumerate(given.messages) if message["role"] == "user"]
    if not asked:
        raise UserError(f"{given.where}: there is no user message.", "Remove this row.")
    given = replace(given, messages=given.messages[: asked[-1] + 1])
    return (render(given, tokenizer, ask=True), False) if template else (f"{given.plain()}\n\nAssistant:", True)


def up_to_answer(given: str | Conversation) -> str | Conversation:
    """A conversation up to the last answer to a question; unchanged if there is none."""
    if isinstance(given, str):
        return given
    roles = [message["role"] for message in given.messages]
    ends = [end for end in range(2, len(roles) + 1) if roles[end - 2 : end] == ["user", "assistant"]]
    return replace(given, messages=given.messages[: ends[-1]]) if ends else given


def answer_of(given: str | Conversation, tokenizer: Any) -> tuple[int, ...]:
    """The tokens of the final answer of a conversation, with its end token if the template writes one; nothing without
    an answer.

    Raises:
        UserError: the template refuses the conversation.
    """
    if isinstance(given, str) or [message["role"] for message in given.messages[-2:]] != ["user", "assistant"]:
        return ()
    answer = given.messages[-1]["content"]
    text, turns = f" {answer}", learn_turns(tokenizer)
    if getattr(tokenizer, "chat_template", None):
        asked, _ = prompt_of(given, tokenizer)
        whole = render(given, tokenizer)
        text = whole[len(asked) :] if whole.startswith(asked) else answer
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = next((number + 1 for number, token in enumerate(ids) if turns and token in turns.enders), len(ids))
    return ids[:end]


def answers_in(ids_NT: Tensor, turns: Turns) -> Tensor:
    """True at the assistant's tokens, `[N, T]`: those after each of its headers, with the end token."""
    header_H = torch.tensor(turns.to_assistant)
    length, (n, width) = len(header_H), ids_NT.shape
    found_NT = torch.zeros(n, width, dtype=torch.bool)
    if width < length:
        return found_NT
    begins = (ids_NT.unfold(1, length, 1) == header_H).all(-1)
    ends_NT = torch.isin(ids_NT, torch.tensor(sorted(turns.enders)))
    for row, at in begins.nonzero().tolist():
        rest_T = ends_NT[row, at + length :].nonzero()
        stop = width if len(rest_T) == 0 else at + length + int(rest_T[0]) + 1
        found_NT[row, at + length : stop] = True
    return found_NT


def rows_of_messages(ids_NT: Tensor, tokenizer: Any, turns: Turns | None) -> Iterator[dict[str, Any]]:
    """Self-written text as rows of a data set: conversations as messages, or documents as text."""
    for ids in ids_NT.tolist():
        if turns is None:
            yield {"text": tokenizer.decode(ids, skip_special_tokens=True)}
        else:
            yield {"messages": list(_messages(ids[len(turns.opening) :], tokenizer, turns))}


def _messages(ids: list[int], tokenizer: Any, turns: Turns) -> Iterator[dict[str, str]]:
    role, form = "user", turns.to_assistant
    while ids:
        end = ids.index(form[0]) if form[0] in ids else len(ids)
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if text.strip():
            yield {"role": role, "content": text}
        ids = ids[end + len(form) :]
        role, form = ("assistant", turns.to_user) if role == "user" else ("user", turns.to_assistant)
