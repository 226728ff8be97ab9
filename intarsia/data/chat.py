"""Conversations as a model's chat template writes them, and back: turns, and which tokens are the assistant's.

No particular template is assumed: how it writes turns is learnt by rendering marked messages; the text before, between
and after the marks is the form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from intarsia.data.conversations import Conversation
from intarsia.errors import UserError

_MARKS = ("Zq1", "Zq2", "Zq3")


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Token ids around the turns of a conversation.

    `opening` comes before the first user turn (with whatever system text the template puts there by itself);
    `to_assistant` between a user turn and the answer; `to_user` between an answer and the next user turn; `enders` are
    the tokens that end a turn when the model writes them.
    """

    opening: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    enders: frozenset[int]


def learn_turns(tokenizer: Any) -> Turns | None:
    """The form of a tokenizer's chat template, or None where it has none or it cannot be learnt.

    A template that refuses such a conversation, or leaves a message out of it, teaches nothing.
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
    except Exception:  # a template is a program of its author's, which raises what it likes
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
    """A conversation as the tokenizer's chat template writes it.

    Args:
        ask: let it end where the assistant's answer begins.

    Raises:
        UserError: the template refuses it.
    """
    tools = None if conversation.tools is None else [dict(tool) for tool in conversation.tools]
    messages = [dict(message) for message in conversation.messages]
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program of its author's, which raises what it likes
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{conversation.where}: the model's chat template refuses this conversation ({said}).",
            "Correct or leave out such rows, or give their text: FILE#column=NAME.",
        ) from error
    return text


def prompt_of(given: str | Conversation, tokenizer: Any, *, where: str = "a prompt") -> tuple[str, bool]:
    """A question, or a conversation up to its last question, as text to be answered; and whether special tokens are
    missing in it, because the model has no chat template.

    Args:
        where: names a question in errors; a conversation knows its row.

    Raises:
        UserError: the template refuses it, or nobody asks anything.
    """
    template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(given, str):
        if not template:
            return given, True
        given = Conversation(messages=({"role": "user", "content": given},), where=where, columns="")
    asked = [number for number, message in enumerate(given.messages) if message["role"] == "user"]
    if not asked:
        raise UserError(f"{given.where}: no message is the user's.", "Leave this row out.")
    given = replace(given, messages=given.messages[: asked[-1] + 1])
    return (render(given, tokenizer, ask=True), False) if template else (f"{given.plain()}\n\nAssistant:", True)


def up_to_answer(given: str | Conversation) -> str | Conversation:
    """A conversation up to the last answer to a question; as it is where there is none."""
    if isinstance(given, str):
        return given
    roles = [message["role"] for message in given.messages]
    ends = [end for end in range(2, len(roles) + 1) if roles[end - 2 : end] == ["user", "assistant"]]
    return replace(given, messages=given.messages[: ends[-1]]) if ends else given


def answer_of(given: str | Conversation, tokenizer: Any) -> tuple[int, ...]:
    """The answer that ends a conversation, as tokens, with the one that ends it where the template writes one; nothing
    where there is no answer.

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
    """Which tokens the assistant wrote, `[N, T]` bool: those after each of its headers, with the one that ends it."""
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
    """What a model wrote itself as rows of a data set: its conversations as messages, or its documents as text."""
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
