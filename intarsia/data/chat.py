"""How a chat template writes turns, learnt by rendering it with marked messages.

No particular template is assumed: the text before, between and after the marks is the form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
