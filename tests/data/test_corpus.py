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
    with pytest.raises(UserError, match="held out"):
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
