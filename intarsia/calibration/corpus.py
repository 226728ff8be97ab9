"""Text as pinned token sequences.

The same source, tokenizer, sizes and seed give the same bytes; the hash says so. Sequences are packed full, so there
is no padding unless a corpus is built with a mask (then padding is on the right, and never counts anywhere).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """N sequences of T tokens.

    `input_ids` [N, T] int64; `mask` [N, T] bool, True at real tokens, None when all are real (padding is on the
    right); `sha256` is over ids and mask; `documents` counts the documents that the text was taken from.
    """

    input_ids: Tensor
    mask: Tensor | None
    description: str
    sha256: str
    documents: int

    @classmethod
    def of(cls, input_ids: Tensor, *, mask: Tensor | None = None, description: str, documents: int) -> Corpus:
        """A corpus with its hash worked out."""
        input_ids = input_ids.to(torch.int64).contiguous()
        digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
        digest.update(input_ids.numpy().astype("<i8").tobytes())
        if mask is not None:
            mask = mask.to(torch.bool).contiguous()
            assert mask.shape == input_ids.shape, "one mask entry a token"
            assert not bool((mask[:, 1:] & ~mask[:, :-1]).any()), "padding is on the right"
            digest.update(mask.numpy().tobytes())
        return cls(
            input_ids=input_ids, mask=mask, description=description, sha256=digest.hexdigest(), documents=documents
        )

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def seq_len(self) -> int:
        """Tokens a sequence, with padding."""
        return int(self.input_ids.shape[1])

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    def batches(self, n_sequences: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The sequences in order, at most `n_sequences` at a time, as (ids, mask or None)."""
        assert n_sequences > 0
        for start in range(0, len(self), n_sequences):
            part = slice(start, start + n_sequences)
            yield self.input_ids[part], None if self.mask is None else self.mask[part]

    def take(self, n: int) -> Corpus:
        """The first n sequences.

        Raises:
            UserError: there are fewer.
        """
        if not 1 <= n <= len(self):
            raise UserError.of(
                where=f"corpus {self.description}",
                expected=f"at least {n} sequences of {self.seq_len} tokens (and at least 1)",
                found=str(len(self)),
                remedy="Ask for fewer sequences, or give more tokens.",
            )
        return self._part(slice(0, n), f"the first {n} sequences of {self.description}")

    def split(self, fraction: float) -> tuple[Corpus, Corpus]:
        """The first `fraction` of the sequences, and the rest; at least one each.

        Raises:
            UserError: there is only one sequence.
        """
        assert 0.0 < fraction < 1.0
        if len(self) < 2:
            raise UserError.of(
                where=f"corpus {self.description}",
                expected="at least 2 sequences, so that some can be held out",
                found=str(len(self)),
                remedy="Give more tokens, or a smaller sequence length.",
            )
        n = min(max(round(len(self) * fraction), 1), len(self) - 1)
        rest = len(self) - n
        return self.take(n), self._part(slice(n, None), f"the last {rest} sequences of {self.description}")

    def _part(self, part: slice, description: str) -> Corpus:
        mask = None if self.mask is None else self.mask[part]
        return Corpus.of(self.input_ids[part], mask=mask, description=description, documents=self.documents)
