from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.evaluation.perplexity import eval_corpus, perplexity, window_losses
from tests import families

TEXT = families.sample_text(300, seed=4)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("batch_tokens", [1, 70, 4096])
def test_protocol_by_hand(text: str, family: str, batch_tokens: int) -> None:
    """Windows side by side over the text's tokens; each predicts all its tokens but the first."""
    model, tokenizer = families.make_model(family), families.make_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    losses = []
    with torch.inference_mode():
        for start in range(0, 5 * 32, 32):
            window = torch.tensor([ids[start : start + 32]])
            log_p = F.log_softmax(model(input_ids=window).logits[0].double(), dim=-1)
            losses.append([-log_p[t, window[0, t + 1]].item() for t in range(31)])
    nll = sum(map(sum, losses)) / (5 * 31)
    means = [sum(window) / 31 for window in losses]
    spread = math.sqrt(sum((mean - nll) ** 2 for mean in means) / 4 / 5)

    corpus = eval_corpus(text, tokenizer, seq_len=32, windows=5)
    score = perplexity(model, corpus, batch_tokens=batch_tokens)
    assert score.nll == pytest.approx(nll, rel=1e-5)
    assert score.value == pytest.approx(math.exp(nll), rel=1e-5)
    assert score.nll_stderr == pytest.approx(spread, rel=1e-3)
    assert score.stderr == pytest.approx(score.value * spread, rel=1e-3)
    assert (score.tokens, score.windows, score.seq_len, score.dtype) == (155, 5, 32, "float32")
    assert (score.text, score.text_sha256) == (text, corpus.sha256)


def test_equals_the_loss_of_transformers(text: str) -> None:
    model = families.make_model("qwen3")
    corpus = eval_corpus(text, families.make_tokenizer(), seq_len=64, windows=4)
    with torch.inference_mode():
        expected = model(input_ids=corpus.input_ids, labels=corpus.input_ids).loss.item()
    assert perplexity(model, corpus).nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_padding_never_counts(text: str, family: str) -> None:
    model, tokenizer = families.make_model(family), families.make_tokenizer()
    full = eval_corpus(text, tokenizer, seq_len=24, windows=3)
    lengths = (24, 13, 2)
    mask = torch.arange(24)[None] < torch.tensor(lengths)[:, None]
    junk = torch.randint(2, families.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    padded = Corpus.of(torch.where(mask, full.input_ids, junk), mask=mask, description="padded", documents=1)
    sums, counts = window_losses(model, padded)
    assert counts.tolist() == [23, 12, 1]
    for i, length in enumerate(lengths):
        alone = Corpus.of(full.input_ids[i : i + 1, :length], description="alone", documents=1)
        assert sums[i].item() == pytest.approx(window_losses(model, alone)[0].item(), rel=1e-5)
    score = perplexity(model, padded)
    assert score.tokens == 36
    assert score.nll == pytest.approx(sums.sum().item() / 36, rel=1e-9)


def test_parts_and_as_many_windows_as_there_are(text: str) -> None:
    tokenizer = families.make_tokenizer()
    everything = eval_corpus(text, tokenizer, seq_len=16, windows=None)
    tokens = len(tokenizer(TEXT)["input_ids"])
    assert len(everything) == tokens // 16
    assert len(eval_corpus(text, tokenizer, seq_len=16, windows=10**6)) == tokens // 16
    tail = eval_corpus(f"{text}#0.9:1", tokenizer, seq_len=16, windows=2)
    assert tail.description.endswith("text.txt#0.9:1")
    assert tail.sha256 != everything.take(2).sha256
    with pytest.raises(UserError, match="expected at least"):
        eval_corpus(text, tokenizer, seq_len=10**6, windows=1)


def test_one_window_has_no_scatter(text: str) -> None:
    score = perplexity(
        families.make_model("llama"), eval_corpus(text, families.make_tokenizer(), seq_len=16, windows=1)
    )
    assert score.stderr == score.nll_stderr == 0.0
    assert "1 windows of 16" in str(score)


def test_training_mode_is_put_back(text: str) -> None:
    model = families.make_model("opt").train()
    corpus = eval_corpus(text, families.make_tokenizer(), seq_len=16, windows=2)
    assert perplexity(model, corpus) == perplexity(model, corpus)
    assert model.training


def test_weights_that_are_not_finite(text: str) -> None:
    model = families.make_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[1, 1] = torch.inf
    corpus = eval_corpus(text, families.make_tokenizer(), seq_len=16, windows=2)
    with pytest.raises(UserError, match=r"perplexity on .*text\.txt, sequence 0 of the batch: expected finite"):
        perplexity(model, corpus)


def test_nothing_to_predict() -> None:
    mask = torch.tensor([[True, False, False]])
    corpus = Corpus.of(torch.ones(1, 3, dtype=torch.int64), mask=mask, description="one token", documents=1)
    with pytest.raises(UserError, match="No window of one token"):
        perplexity(families.make_model("llama"), corpus)
