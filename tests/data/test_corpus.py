"""Text packed into sequences."""

from __future__ import annotations

import pytest
import torch

from intarsia.data.corpus import Corpus, tokenize
from intarsia.errors import UserError
from tests.data.letters import Letters, rows


def test_take_split_and_batches() -> None:
    corpus = tokenize(["abcdefghijklmnopqrst"], Letters(), tokens=20, seq_len=4, shuffle=False)
    assert rows(corpus.take(2)) == ["abcd", "efgh"]
    first, rest = corpus.split(0.6)
    assert (rows(first), rows(rest)) == (["abcd", "efgh", "ijkl"], ["mnop", "qrst"])
    assert first.sha256 == corpus.take(3).sha256 != rest.sha256
    assert [len(ids) for ids, _ in corpus.batches(2)] == [2, 2, 1]
    assert len(corpus.split(0.001)[0]) == 1 and len(corpus.split(0.999)[1]) == 1
    with pytest.raises(UserError, match="to hold some out"):
        corpus.take(1).split(0.5)


def test_mask_counts_and_is_hashed() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    padded = Corpus.of(ids, mask=mask, description="padded", documents=2)
    assert padded.tokens == 4
    assert padded.sha256 != Corpus.of(ids, description="full", documents=2).sha256
    part = list(padded.batches(1))[1][1]
    assert part is not None and part.tolist() == [[True, False, False]]
    assert Corpus.of(ids.view(2, 3), description="", documents=1).sha256 != (
        Corpus.of(ids.view(3, 2), description="", documents=1).sha256
    )


def test_packs_documents_joined_by_eos() -> None:
    corpus = tokenize(["abc", "de", "fghij"], Letters(), tokens=11, seq_len=4, shuffle=False)
    assert rows(corpus) == ["abc/", "de/f"]
    assert (corpus.tokens, corpus.documents, corpus.seq_len, len(corpus), corpus.mask) == (8, 3, 4, 2, None)


def test_bos_where_the_tokenizer_puts_one() -> None:
    corpus = tokenize(["abcdefghij"], Letters(bos=True), tokens=12, seq_len=4, shuffle=False)
    assert rows(corpus) == ["^abc", "^def", "^ghi"]


def test_no_eos_no_joint() -> None:
    letters = Letters()
    letters.eos_token_id = None
    assert rows(tokenize(["abc", "de"], letters, tokens=4, seq_len=4, shuffle=False)) == ["abcd"]


def test_reads_no_more_than_it_needs() -> None:
    letters = Letters()
    tokenize((f"text{i:04}" for i in range(10_000)), letters, tokens=64, seq_len=8, shuffle=False)
    assert len(letters.read) < 500


def test_shuffle_reaches_the_whole_source_and_follows_the_seed() -> None:
    text = "".join(chr(100 + i) * 4 for i in range(200))
    one, same, other = (
        tokenize([text], Letters(), tokens=160, seq_len=4, seed=seed, shuffle=True) for seed in (1, 1, 2)
    )
    assert torch.equal(one.input_ids, same.input_ids)
    assert one.sha256 == same.sha256 != other.sha256
    starts = one.input_ids[:, 0].tolist()
    assert len(set(starts)) == 40  # none twice
    assert max(starts) > 270 and min(starts) < 130


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tokenize(["abc" * 50], Letters(), tokens=16, seq_len=4, shuffle=True)
    assert torch.equal(torch.rand(3), expected)


def test_too_short_says_how_many_there_are() -> None:
    with pytest.raises(UserError, match=r"words: expected at least 16 tokens.*found 9 tokens.*at most 8 tokens"):
        tokenize(["abcdefghi"], Letters(), tokens=16, seq_len=4, shuffle=True, description="words")
    with pytest.raises(UserError, match=r"found 3 tokens.*shorter sequences"):
        tokenize(["abc"], Letters(), tokens=4, seq_len=4, shuffle=False)
    with pytest.raises(UserError, match="found 3 tokens"):
        tokenize(["abc"], Letters(), tokens=4, seq_len=4, shuffle=False, least=1)
    assert len(tokenize(["abcdefghi"], Letters(), tokens=99, seq_len=4, shuffle=False, least=1)) == 2


@pytest.mark.parametrize(("tokens", "seq_len"), [(3, 4), (10, 1), (10, 0)])
def test_impossible_sizes(tokens: int, seq_len: int) -> None:
    with pytest.raises(UserError, match="sequence length of at least 2"):
        tokenize(["abcdefghi"], Letters(), tokens=tokens, seq_len=seq_len, shuffle=False)
