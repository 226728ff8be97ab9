"""Greedy answers of a model to prompts, whether they loop, and two of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.data.self_text import Sampling, rows_at_once, write_on
from intarsia.evaluation.prompts import Ids, Prompts
from intarsia.progress import current

_REPEATS, _LEAST = 3, 12  # a loop has a passage three times, in at least so many tokens


def greedy_answers(model: Any, tokenizer: Any, prompts: Prompts, answer_tokens: int) -> tuple[Ids, ...]:
    """A model's likeliest answers, each with the token that ends it, or cut at its greatest length.

    Prompts of similar length are answered side by side: in a row whose prompt is not over, its tokens come next.
    """
    known, found = prompts.ids, dict[int, Ids]()
    order = sorted(range(len(known)), key=lambda number: len(known[number]))
    longest = max(map(len, known)) + answer_tokens
    size = rows_at_once(model, longest, Sampling())
    forced = max(map(len, known)) - min(map(len, known))  # at most: rows wait for the longest prompt among them
    with current().task("answers", total=len(known) * (answer_tokens + forced)) as task:
        for start in range(0, len(order), size):
            batch = [known[number] for number in order[start : start + size]]
            rows = _greedy(model, len(tokenizer), batch, prompts.enders, answer_tokens, task)
            found |= dict(zip(order[start : start + size], rows, strict=True))
    return tuple(found[number] for number in range(len(known)))


def _greedy(
    model: Any, vocabulary: int, prompts: Sequence[Ids], enders: frozenset[int], answer_tokens: int, task: Any
) -> list[Ids]:
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest + answer_tokens, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
    ended = [False] * len(prompts)

    def choose(logits_BV: Tensor, column: int) -> Tensor | None:
        likeliest = logits_BV[:, :vocabulary].argmax(-1).tolist()
        for row, prompt in enumerate(prompts):
            if column < len(prompt):
                likeliest[row] = prompt[column]
            else:
                ended[row] |= column >= len(prompt) + answer_tokens
                if not ended[row]:
                    ids_BT[row, column] = likeliest[row]
                    ended[row] = likeliest[row] in enders
        return None if all(ended) else torch.tensor(likeliest)

    write_on(model, ids_BT, shortest, choose, task)
    answers = []
    for row, prompt in zip(ids_BT.tolist(), prompts, strict=True):
        answer = row[len(prompt) : len(prompt) + answer_tokens]
        end = next((index + 1 for index, token in enumerate(answer) if token in enders), len(answer))
        answers.append(tuple(answer[:end]))
    return answers


def loops(answer: Ids, enders: frozenset[int]) -> bool:
    """Whether an answer ends in repeating itself: it has not ended, and its last tokens are one passage three times."""
    if not answer or answer[-1] in enders:
        return False
    for period in range(1, len(answer) // _REPEATS + 1):
        tail = answer[-max(_REPEATS * period, _LEAST) :]
        if len(tail) >= _LEAST and tail[period:] == tail[:-period]:
            return True
    return False


def side_by_side(tokenizer: Any, original: Ids, answer: Ids) -> dict[str, Any]:
    """Two answers, each as the text that they share, the first token that differs, and the rest."""
    pairs = zip(original, answer, strict=False)
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(original), len(answer)))

    def parts(ids: Ids) -> list[str]:
        shared, first, whole = (
            tokenizer.decode(ids[:end], skip_special_tokens=True) for end in (same, same + 1, len(ids))
        )
        return [shared, first[len(shared) :], whole[max(len(first), len(shared)) :]]

    return {"same_tokens": same, "original": parts(original), "new": parts(answer)}
