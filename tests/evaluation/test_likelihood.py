"""Log-likelihoods: by hand, however they are batched, and as lm-eval computes them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from intarsia.errors import UserError
from intarsia.evaluation.likelihood import (
    Request,
    encode_pairs,
    fit,
    positions_of,
    score_requests,
    takes_packed_rows,
)
from tests import families


def some_requests(seed: int = 0) -> list[Request]:
    """Five contexts with two to five continuations of one to nine tokens; one of them stands alone."""
    chance = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(chance.randrange(2, families.VOCABULARY) for _ in range(n))

    found = []
    for length, choices in ((7, 2), (23, 4), (1, 3), (11, 5), (40, 1)):
        context = tokens(length)
        found += [Request(context=context, continuation=tokens(chance.randint(1, 9))) for _ in range(choices)]
    chance.shuffle(found)
    return found


def by_hand(model: torch.nn.Module, request: Request) -> tuple[float, bool]:
    """One row, all logits, no batch."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0].double()
    first = len(request.context) - 1
    log_p = F.log_softmax(logits[first:-1], dim=-1)
    total = sum(log_p[i, token].item() for i, token in enumerate(request.continuation))
    return total, log_p.argmax(-1).tolist() == list(request.continuation)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_by_hand(family: str, batch_tokens: int) -> None:
    model = families.make_model(family)
    requests = some_requests()
    with torch.inference_mode():  # one that the model would write itself
        context = requests[0].context
        likeliest = model(input_ids=torch.tensor([context])).logits[0, -1].argmax().item()
    requests.append(Request(context=context, continuation=(int(likeliest),)))
    found = score_requests(model, requests, batch_tokens=batch_tokens)
    for request, total, greedy in zip(requests, found.sums_R.tolist(), found.greedy_R.tolist(), strict=True):
        expected, expected_greedy = by_hand(model, request)
        assert total == pytest.approx(expected, abs=2e-4)
        assert greedy == expected_greedy
    assert found.greedy_R[-1]


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_rows_equal_plain_rows(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2: it cannot cap scores")
    model = families.make_model(family)
    model.set_attn_implementation(attention)
    requests = [request for request in some_requests(3) if len(request.context) + len(request.continuation) <= 30]
    if takes_packed_rows(model, 5) and not takes_packed_rows(model, 30):  # a sliding window: short rows only
        requests = [Request(context=request.context[:1], continuation=request.continuation[:4]) for request in requests]
    assert takes_packed_rows(model, max(len(request.context) + len(request.continuation) for request in requests))
    packed = score_requests(model, requests, batch_tokens=100)
    plain = score_requests(model, requests, pack=False, batch_tokens=100)
    torch.testing.assert_close(packed.sums_R, plain.sums_R, atol=2e-4, rtol=0)


def test_what_takes_shared_rows() -> None:
    assert takes_packed_rows(families.make_model("llama"), 10**6)
    assert takes_packed_rows(families.make_model("mistral"), 7)
    assert not takes_packed_rows(families.make_model("mistral"), 8)
    assert not takes_packed_rows(families.make_model("qwen3"), 6)
    other = families.make_model("llama")
    other.config.model_type = "a family nobody knows"
    assert not takes_packed_rows(other, 5)
    request = some_requests()[0]
    assert score_requests(other, [request]).sums_R.item() == pytest.approx(by_hand(other, request)[0], abs=2e-4)


def test_a_context_is_read_once() -> None:
    """Four one-token choices cost the context and nothing else; the head reads what is scored alone."""
    model = families.make_model("llama")
    read: list[int] = []
    scored: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: scored.append(len(output)))
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    context = tuple(range(2, 12))
    score_requests(model, [Request(context=context, continuation=(token,)) for token in (5, 6, 7, 8)])
    assert read == [10]
    read.clear()
    score_requests(model, [Request(context=context, continuation=(token, 9, 4)) for token in (5, 6, 7, 8)])
    assert read == [10 + 4 * 2]
    assert scored == [1, 1 + 4 * 2]


def test_training_mode_is_put_back_and_nothing_to_do_is_nothing() -> None:
    model = families.make_model("opt").train()
    request = some_requests()[0]
    assert score_requests(model, [request]).sums_R.tolist() == score_requests(model, [request]).sums_R.tolist()
    assert model.training
    assert score_requests(model, []).sums_R.tolist() == []


def test_weights_that_are_not_finite() -> None:
    model = families.make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="log-likelihood of piqa has NaN"):
        score_requests(model, some_requests(), where="piqa")


def harness_requests(pairs: list[tuple[str, str]], tokenizer: Any, model: Any) -> list[tuple[Any, Any]]:
    """How lm-eval cuts the same texts."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    return [tuple(map(tuple, lm._encode_pair(*pair))) for pair in pairs]


def test_the_cut_is_that_of_lm_eval() -> None:
    pairs = [
        ("Question: why?\nAnswer:", " because"),
        ("ends in a space ", "word"),
        ("ends in much white space \n\n", " word  "),
        ("no space at the seam", "continues"),
        ("</s>begins with its BOS", " x"),
        ("ünïcode — ", "日本"),
    ]
    tokenizer, model = families.make_tokenizer(), families.make_model("llama")
    ours = encode_pairs(pairs, tokenizer, max_length=None, where="pairs")
    assert [(r.context, r.continuation) for r in ours] == harness_requests(pairs, families.make_tokenizer(), model)
    assert tokenizer.pad_token is None


def test_long_contexts_lose_their_left_end() -> None:
    request = Request(context=tuple(range(10)), continuation=(20, 21, 22))
    assert fit(request, None) == fit(request, 12) == request  # the last token needs no position
    assert fit(request, 11).context == tuple(range(1, 10))
    assert fit(request, 3).context == (9,)
    with pytest.raises(UserError, match=r"items, continuation 1 .*at most 3"):
        encode_pairs([("a b c", " d e f g h i j")], families.make_tokenizer(), max_length=3, where="items")
    with pytest.raises(UserError, match="has 0 tokens"):
        encode_pairs([("a", "")], families.make_tokenizer(), max_length=None, where="items")
    assert positions_of(families.make_model("llama").config) == families.POSITIONS
