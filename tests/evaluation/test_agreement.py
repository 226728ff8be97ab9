"""Agreement: of a model with itself, of a random one, by hand; prompts from files; loops; greedy answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.errors import UserError
from intarsia.evaluation.agreement import Asked, Reference, doubt
from intarsia.evaluation.answers import Prompts, greedy_answers, loops, side_by_side
from intarsia.evaluation.results import Metric
from intarsia.options import AnswerSpec
from tests import families

TOKENS = 6


@pytest.fixture(autouse=True)
def cache_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))


def _prompts(tokenizer: Any, *texts: str) -> Prompts:
    return Prompts.of(texts or ("roti sa", "a", "kana roti lu mi"), tokenizer, source="by hand")


def _reference(model: Any, tokenizer: Any, **how: Any) -> Reference:
    return Reference.of(model, tokenizer, _prompts(tokenizer), answer_tokens=TOKENS, **how)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_greedy_answers_are_those_of_generate(family: str) -> None:
    """Of prompts of different lengths side by side, each alone."""
    model, tokenizer = families.make_model(family), families.make_tokenizer()
    prompts = _prompts(tokenizer)
    found = greedy_answers(model, tokenizer, prompts, TOKENS)
    for prompt, answer in zip(prompts.ids, found, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS)
        wanted = whole[0, len(prompt) :].tolist()
        assert list(answer) == (wanted[: wanted.index(0) + 1] if 0 in wanted else wanted)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_model_agrees_with_itself(family: str) -> None:
    model, tokenizer = families.make_model(family), families.make_tokenizer()
    reference = _reference(model, tokenizer)
    found, itself = reference.score(reference.follow(model), model), reference.itself()
    assert found.agreement == itself.agreement == Metric(value=1.0, stderr=0.0)
    assert found.kl.value == pytest.approx(0.0, abs=1e-6)
    assert (found.prompts, found.tokens) == (3, sum(map(len, reference.answers)))
    assert found.length == itself.length and found.length.value == found.tokens / 3
    assert found.perplexity.value == pytest.approx(itself.perplexity.value)
    assert found.examples[0]["new"] == found.examples[0]["original"] and found.examples[0]["new"][1:] == ["", ""]


def test_by_hand() -> None:
    """Agreement, KL and perplexity from whole logits of each answer by itself."""
    original, other = (families.make_model("llama", seed=seed) for seed in (0, 1))
    with torch.no_grad():  # near enough to agree on some tokens and not on all
        for mine, theirs in zip(other.parameters(), original.parameters(), strict=True):
            mine.copy_(0.1 * mine + 0.9 * theirs)
    tokenizer = families.make_tokenizer()
    reference = _reference(original, tokenizer)
    followed = reference.follow(other)
    found = reference.score(followed, original)
    agree, kl, own = [], [], []
    for prompt, answer, theirs in zip(reference.prompts.ids, reference.answers, followed.answers, strict=True):
        ids, start = torch.tensor([[*prompt, *answer]]), len(prompt) - 1
        with torch.no_grad():
            t, s = (model(ids).logits[0, start:-1].log_softmax(-1) for model in (original, other))
            scored = original(torch.tensor([[*prompt, *theirs]])).logits[0, start:-1].log_softmax(-1)
        agree.append((t.argmax(-1) == s.argmax(-1)).double())
        top_p, top = t.topk(64)
        s_p = s.gather(1, top)
        rest = [(1 - p.exp().sum(-1)).clamp_min(1e-6) for p in (top_p, s_p)]
        kl.append((top_p.exp() * (top_p - s_p)).sum(-1) + rest[0] * (rest[0].log() - rest[1].log()))
        own.append(-scored.gather(1, torch.tensor(theirs)[:, None])[:, 0])
    assert found.agreement.value == pytest.approx(float(torch.cat(agree).mean()))
    assert 0.0 < found.agreement.value < 1.0
    assert found.kl.value == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.perplexity.value == pytest.approx(math.exp(float(torch.cat(own).mean())), rel=1e-4)
    sizes = torch.tensor([len(each) for each in agree])
    gaps = torch.tensor([float(each.sum()) for each in agree]) - found.agreement.value * sizes
    assert found.agreement.stderr == pytest.approx(
        math.sqrt(float(gaps.square().sum()) / (3 * 2)) / float(sizes.double().mean()), rel=1e-5
    )


def test_a_random_model_agrees_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in V next tokens: exactly, as the mean over all V ways to turn the numbers of its tokens around."""
    original, other = families.make_model("llama"), families.make_model("llama", seed=9)
    reference = _reference(original, families.make_tokenizer())
    monkeypatch.setattr("intarsia.evaluation.agreement.greedy_answers", lambda *_: reference.answers)
    rows, agreed = other.lm_head.weight.detach().clone(), []
    for turn in range(families.VOCABULARY):
        other.lm_head.weight.data = rows.roll(turn, 0)
        followed = reference.follow(other)
        agreed.append(float(followed.agree_P.sum()) / sum(map(len, reference.answers)))
        assert bool((followed.kl_P > 0.0).all())
    assert sum(agreed) / families.VOCABULARY == pytest.approx(1 / families.VOCABULARY)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([7] * 12, True),
        ([7] * 11, False),
        ([1, 2, 3] * 4, True),
        ([9, 9, *[1, 2, 3, 4, 5] * 3], True),
        ([1, 2, 3, 4, 5] * 2, False),
        ([*[1, 2, 3] * 4, 0], False),  # it has ended
        ([*[1, 2, 3] * 4, 1, 2], True),
        (list(range(60)), False),
        ([], False),
    ],
)
def test_loops(answer: list[int], expected: bool) -> None:
    assert loops(tuple(answer), frozenset({0})) is expected


def test_answers_side_by_side() -> None:
    tokenizer = families.make_tokenizer()
    first, second = (tuple(tokenizer(text)["input_ids"]) for text in ("roti sa x", "roti sa y z"))
    found = side_by_side(tokenizer, first, second)
    assert "".join(found["original"]) == "roti sa x" and "".join(found["new"]) == "roti sa y z"
    assert found["original"][0] == found["new"][0] and found["original"][0].startswith("roti sa")
    assert found["original"][1] != found["new"][1]
    assert first[: found["same_tokens"]] == second[: found["same_tokens"]]


def test_prompts_of_files(tmp_path: Path) -> None:
    tokenizer = families.make_tokenizer(chat=True)

    def read(name: str, text: str, **limits: Any) -> list[str]:
        (tmp_path / name).write_text(text)
        how: dict[str, Any] = {"n": 9, "answer_tokens": 5, "positions": 60, **limits}
        found = Prompts.read(str(tmp_path / name), tokenizer, **how)
        assert all(question in tokenizer.decode(ids) for question, ids in zip(found.texts, found.ids, strict=True))
        return [tokenizer.decode(ids) for ids in found.ids]

    asked = ["<|user|>one</s><|assistant|>", "<|user|>two</s><|assistant|>"]
    assert read("a.txt", "one\n\ntwo\n") == asked
    assert read("a.jsonl", '{"query": "one", "answer": "x"}\n{"query": "two", "answer": "y"}\n') == asked
    assert read("b.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n', n=1) == asked[:1]
    talk = [{"role": role, "content": role[:1]} for role in ("user", "assistant", "user", "assistant")]
    messages = json.dumps({"messages": talk}) + "\n"
    assert read("c.jsonl", messages) == ["<|user|>u</s><|assistant|>a</s><|user|>u</s><|assistant|>"]
    tokenizer.chat_template = None
    assert read("a.txt", "one\ntwo\n") == ["one", "two"]
    with pytest.raises(UserError, match=r"Prompt 2 of .*a\.txt has \d+ tokens, and its answer up to 5.*60 positions"):
        read("a.txt", f"one\n{'two ' * 60}\n")
    with pytest.raises(UserError, match="there is no user message"):
        read("d.jsonl", json.dumps({"messages": talk[1:2]}) + "\n")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"^Prompt 1 of .*a\.txt: the model's chat template refuses .* \(no\)\."):
        read("a.txt", "one\ntwo\n")


def test_answers_that_are_given(tmp_path: Path) -> None:
    """With the token that ends them, up to the greatest length; each row needs one."""
    tokenizer = families.make_tokenizer(chat=True)

    def read(*rows: Any, chat: bool = True) -> list[str]:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer.chat_template = families.CHAT_TEMPLATE if chat else None
        found = Prompts.read(str(tmp_path / "a.jsonl"), tokenizer, n=9, answer_tokens=4, positions=60, given=True)
        assert found.given is not None and found.sha256 != replace(found, given=None).sha256
        assert found.source == f"{tmp_path / 'a.jsonl'}, with its answers"
        return [tokenizer.decode(ids) for ids in found.given]

    assert read({"prompt": "one", "response": "ab"}, {"prompt": "two", "response": "roti sa roti sa"}) == [
        "ab</s>",
        tokenizer.decode(tokenizer("roti sa roti sa")["input_ids"][:4]),
    ]
    talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    assert read({"messages": talk}, {"messages": talk[:3]}) == ["d</s>", "b</s>"]
    assert read({"prompt": "one", "response": "ab"}, chat=False) == [" ab"]
    for rows in ([{"messages": talk}, {"messages": talk[:1]}], [{"text": "a"}]):
        message = rf"^Prompt {len(rows)} of .* has no answer, and streamed models do not generate\."
        with pytest.raises(UserError, match=message):
            read(*rows)


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_that_the_original_writes(chat: bool) -> None:
    model, tokenizer = families.make_model("llama"), families.make_tokenizer(chat=chat)
    config = {"max_position_embeddings": 90}
    asked = Asked.of(AnswerSpec(answers=3, answer_tokens=100), tokenizer, config)
    assert asked is not None and asked.answer_tokens == 45
    first, again = (asked.answered(model, seed=0, key="abc") for _ in range(2))
    assert first.prompts == again.prompts and len(first.prompts.ids) == 3
    assert first.prompts != asked.answered(model, seed=1, key="abc").prompts
    assert first.answers == again.answers
    for prompt in first.prompts.ids:
        assert len(prompt) + asked.answer_tokens <= 90
        if chat:
            text = tokenizer.decode(prompt)
            assert text.startswith("<|user|>") and text.endswith("</s><|assistant|>")
    shown = [each["prompt"] for each in first.itself().examples]
    assert shown == [text.strip() for text in first.prompts.texts] and "<|" not in "".join(shown)
    assert Asked.of(AnswerSpec(answers=0), tokenizer) is Asked.of(AnswerSpec(), tokenizer, stream=True) is None


def test_a_prompt_may_be_alone() -> None:
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    reference = Reference.of(model, tokenizer, _prompts(tokenizer, "roti"), answer_tokens=TOKENS)
    assert reference.itself().agreement == Metric(value=1.0, stderr=None)


def test_numbers_that_are_not_finite() -> None:
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    reference = _reference(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match="next-token probability has NaN"):
        reference.follow(model)


@pytest.mark.parametrize(
    ("agreement", "loop", "perplexity", "kept", "expected"),
    [
        (0.9, 0.1, 1.2, None, None),
        (0.4, 0.1, 9.0, None, None),  # nothing looks well
        (0.4, 0.1, 1.2, None, "answers differ more than perplexity says: 40% of tokens agree, 10% loop"),
        (0.9, 0.6, 9.0, 0.95, "answers differ more than accuracy says: 90% of tokens agree, 60% loop"),
        (0.4, 0.6, 9.0, 0.5, None),
        (0.4, None, 1.2, None, "answers differ more than perplexity says: 40% of tokens agree"),  # streamed
        (0.9, None, 1.2, None, None),
    ],
)
def test_the_warning(
    agreement: float, loop: float | None, perplexity: float | None, kept: float | None, expected: str | None
) -> None:
    before = {"loops": {"value": 0.1}, "perplexity": {"value": 10.0}, "accuracy": 0.5}
    after: dict[str, Any] = {"agreement": {"value": agreement}, **({} if loop is None else {"loops": {"value": loop}})}
    after["perplexity"] = None if perplexity is None else {"value": 10.0 * perplexity}
    after["accuracy"] = None if kept is None else 0.5 * kept
    assert doubt(before, after) == expected
    assert doubt({}, after) is doubt(before, {}) is None
