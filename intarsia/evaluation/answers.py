"""Prompts, greedy answers, loops in them, and two answers side by side.

Prompts are questions of a file, or text that a model writes itself, in its chat template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from intarsia.data.conversations import Conversation, answer_of, learn_turns, prompt_of, up_to_answer
from intarsia.data.corpus import check_ids
from intarsia.data.self_text import Sampling, rows_at_once, self_corpus, write_on
from intarsia.data.sources import documents, parse
from intarsia.errors import check
from intarsia.progress import current

_PROMPT = 32  # tokens of a prompt, if the model writes running text
_QUESTION = 64  # most tokens of a question written by the model
_SEED = 7919  # different from the calibration text's

Ids: TypeAlias = tuple[int, ...]
_REPEATS, _LEAST = 3, 12  # a loop has a passage three times, in at least 12 tokens


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts as tokens."""

    ids: tuple[Ids, ...]
    # The questions, for display.
    texts: tuple[str, ...]
    # Tokens that end an answer.
    enders: frozenset[int]
    source: str
    # Given answers; None if models generate them.
    given: tuple[Ids, ...] | None = None

    @property
    def sha256(self) -> str:
        """The hash of their tokens."""
        tokens = self.ids if self.given is None else (self.ids, self.given)
        return hashlib.sha256(repr(tokens).encode()).hexdigest()

    @classmethod
    def of(cls, given: Iterable[str | Conversation], tokenizer: Any, *, source: str) -> Prompts:
        """Questions, or conversations up to their last question, in the model's chat template."""
        known = list(given)
        places = [f"Prompt {number} of {source}" for number in range(1, len(known) + 1)]
        written = [prompt_of(each, tokenizer, where=place) for each, place in zip(known, places, strict=True)]
        return cls(
            ids=tuple(tuple(tokenizer(text, add_special_tokens=special)["input_ids"]) for text, special in written),
            texts=tuple(each if isinstance(each, str) else each.question for each in known),
            enders=_enders(tokenizer),
            source=source,
        )

    @classmethod
    def read(
        cls, spec: str, tokenizer: Any, *, n: int, answer_tokens: int, positions: int | None, given: bool = False
    ) -> Prompts:
        """The first prompts of a file: one per line of a .txt; of a conversation, all before the last answer.

        Args:
            positions: of the model; None for no limit.
            given: also take the answers of the file, up to `answer_tokens` of each.

        Raises:
            UserError: the file cannot be read, a prompt with its answer is too long for the model, or a needed answer
                is missing.
        """
        rows = [up_to_answer(row) if given else row for row in islice(_lines(spec), n)]
        found = cls.of(rows, tokenizer, source=spec)
        if given:
            answers = tuple(answer_of(row, tokenizer)[:answer_tokens] for row in rows)
            found = replace(found, source=f"{spec}, with its answers", given=answers)
        for number, each in enumerate(found.ids, start=1):
            check_ids(max(each, default=0), tokenizer, f"Prompt {number} of {spec}")
            check(
                (bool(each), f"Prompt {number} of {spec} has no tokens.", "Remove it."),
                (
                    found.given is None or bool(found.given[number - 1]),
                    f"Prompt {number} of {spec} has no answer, and streamed models do not generate.",
                    "Give conversations with the original's answers, or leave --stream out.",
                ),
                (
                    positions is None or len(each) + answer_tokens <= positions,
                    f"Prompt {number} of {spec} has {len(each)} tokens, and its answer up to {answer_tokens}; the "
                    f"model has {positions} positions.",
                    "Shorten it, or give fewer --answer-tokens.",
                ),
            )
        return found

    @classmethod
    def written(cls, model: Any, tokenizer: Any, *, n: int, seed: int, longest: int, key: str | None) -> Prompts:
        """Prompts written by a model: questions of a user, or without a chat template the first tokens of texts.

        Args:
            model: the model, or a function that loads it.
            longest: most tokens of a prompt.
            key: the hash of its weights, to cache the prompts; None disables the cache.
        """
        turns = learn_turns(tokenizer)
        around = 0 if turns is None else len(turns.opening) + len(turns.to_assistant)
        if longest < around + 8:
            turns, around = None, 0
        question = max(1, min(_PROMPT if turns is None else _QUESTION, longest - around))
        corpus = self_corpus(
            model,
            tokenizer,
            n=n,
            seq_len=max(2, around + question),
            seed=seed + _SEED,
            cache_key=key,
            sampling=Sampling(longest_question=question),
        )
        rows, start = [tuple(row) for row in corpus.input_ids.tolist()], 0
        answer: Ids = ()
        if turns is not None:
            start, answer = len(turns.opening), turns.to_assistant
            rows = [row[: row.index(answer[0], start)] for row in rows if answer[0] in row[start:]]
        return cls(
            ids=tuple((*row, *answer) for row in rows),
            texts=tuple(tokenizer.decode(row[start:], skip_special_tokens=True) for row in rows),
            enders=_enders(tokenizer),
            source="written by the original",
        )


def _enders(tokenizer: Any) -> frozenset[int]:
    turns, eos = learn_turns(tokenizer), tokenizer.eos_token_id
    return turns.enders if turns is not None else frozenset(() if eos is None else (eos,))


def _lines(spec: str) -> Iterator[str | Conversation]:
    kind = parse(spec).kind
    for document in documents(spec):
        if isinstance(document, str) and kind == "text":
            yield from (line for line in document.splitlines() if line.strip())
        else:
            yield document


def greedy_answers(model: Any, tokenizer: Any, prompts: Prompts, answer_tokens: int) -> tuple[Ids, ...]:
    """A model's greedy answers, each with its end token, or truncated to the greatest length.

    Prompts of similar length are answered side by side; longer prompts are completed before they are answered.
    """
    known, found = prompts.ids, dict[int, Ids]()
    order = sorted(range(len(known)), key=lambda number: len(known[number]))
    longest = max(map(len, known)) + answer_tokens
    size = rows_at_once(model, longest, Sampling())
    forced = max(map(len, known)) - min(map(len, known))  # at most, because rows wait for the longest prompt
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
    """Whether an answer ends in a loop: it has no end token, and its last tokens repeat one passage three times."""
    if not answer or answer[-1] in enders:
        return False
    for period in range(1, len(answer) // _REPEATS + 1):
        tail = answer[-max(_REPEATS * period, _LEAST) :]
        if len(tail) >= _LEAST and tail[period:] == tail[:-period]:
            return True
    return False


def side_by_side(tokenizer: Any, original: Ids, answer: Ids) -> dict[str, Any]:
    """Two answers, each as the shared text, the first differing token, and the rest."""
    pairs = zip(original, answer, strict=False)
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(original), len(answer)))

    def parts(ids: Ids) -> list[str]:
        shared, first, whole = (
            tokenizer.decode(ids[:end], skip_special_tokens=True) for end in (same, same + 1, len(ids))
        )
        return [shared, first[len(shared) :], whole[max(len(first), len(shared)) :]]

    return {"same_tokens": same, "original": parts(original), "new": parts(answer)}
