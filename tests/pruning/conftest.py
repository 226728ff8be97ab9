"""Tokens to plan on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from intarsia.data.corpus import Corpus
from tests import families


@cache
def corpus_of(*, padded: bool = False, sequences: int = 6, seq_len: int = 13) -> Corpus:
    """Random tokens; padded: sequences of different length, the last with one real token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, families.VOCABULARY, (sequences, seq_len), generator=generator)
    if not padded:
        return Corpus.of(ids, description="random tokens", documents=1)
    lengths = torch.linspace(seq_len, 1, sequences).long()
    mask = torch.arange(seq_len)[None, :] < lengths[:, None]
    return Corpus.of(ids, mask=mask, description="padded random tokens", documents=1)


@pytest.fixture(scope="session")
def tokens() -> Any:
    """Gives a corpus of random tokens."""
    return corpus_of
