from __future__ import annotations

import hashlib

import pytest
import torch
from torch.nn import functional as F

from intarsia.evaluation.choices import Question, choice_set, score_items
from tests import families

WORDS = families.sample_text(200, seed=9).replace(".", "").split()


def some_questions(n: int) -> list[Question]:
    """Questions of made-up words, with two to four choices of one to four words."""
    return [
        Question(
            query=" ".join(WORDS[i : i + 3 + i % 4]),
            choices=tuple(" ".join(WORDS[i * c : i * c + 1 + (i + c) % 4]) for c in range(2, 4 + i % 3)),
            gold=i % 2,
        )
        for i in range(1, n + 1)
    ]


def log_p_by_hand(model: torch.nn.Module, query: str, continuation: str) -> tuple[float, int]:
    tokenizer = families.make_tokenizer()
    ids, known = tokenizer.encode(query + continuation), len(tokenizer.encode(query))
    with torch.inference_mode():
        log_p = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(log_p[t - 1, ids[t]].item() for t in range(known, len(ids))), len(ids) - known


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_accuracy_by_hand(family: str) -> None:
    model, questions = families.make_model(family), some_questions(30)
    acc, acc_norm = [], []
    for question in questions:
        sums = [log_p_by_hand(model, question.query, " " + choice)[0] for choice in question.choices]
        normed = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        acc.append(float(sums.index(max(sums)) == question.gold))
        acc_norm.append(float(normed.index(max(normed)) == question.gold))
    score = score_items(model, choice_set("quiz", questions, families.make_tokenizer()))
    assert score.outcomes == {"acc": tuple(acc), "acc_norm": tuple(acc_norm)}
    assert acc != acc_norm
    assert score.metrics["acc"].value == pytest.approx(sum(acc) / 30)
    assert (score.n, score.source, score.primary) == (30, "local", "acc_norm")
    assert score.chance == pytest.approx(sum(1 / len(question.choices) for question in questions) / 30)


def test_ties_go_to_the_first_and_length_counts_in_characters() -> None:
    questions = [
        Question(query="a", choices=("same", "same", "no"), gold=0),
        Question(query="a", choices=("same", "same", "no"), gold=1),
        Question(query="a", choices=("ab", "éééé"), gold=1),
    ]
    items = choice_set("quiz", questions, families.make_tokenizer())
    sums = torch.tensor([-1.0, -1.0, -3.0, -1.0, -1.0, -3.0, -2.0, -3.0], dtype=torch.float64)
    score = items.score(sums)
    assert score.outcomes["acc"] == (1.0, 0.0, 0.0)
    assert score.outcomes["acc_norm"] == (1.0, 0.0, 1.0)  # -3 over four characters, not over eight bytes


def test_items_are_pinned() -> None:
    questions = some_questions(5)
    items = choice_set("quiz", questions, families.make_tokenizer())
    assert items.sha256 == choice_set("other name", questions, families.make_tokenizer()).sha256
    assert items.sha256 != choice_set("quiz", questions[:4], families.make_tokenizer()).sha256
    wrong = Question(query=questions[0].query, choices=questions[0].choices, gold=1 - questions[0].gold)
    assert items.sha256 != choice_set("quiz", [wrong, *questions[1:]], families.make_tokenizer()).sha256
    text = '{"choices": ["a", "b"], "gold": 1, "query": "q"}\n'
    one = choice_set("q", [Question(query="q", choices=("a", "b"), gold=1)], families.make_tokenizer())
    assert one.sha256 == hashlib.sha256(text.encode()).hexdigest()
