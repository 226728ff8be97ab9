"""The text of a training: sequences to learn from, and sequences that are only measured on.

Shape suffixes: `N` sequences, `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.calibration.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Text:
    """All sequences, the held-out ones last. `sha256` names them all."""

    ids_NT: Tensor
    mask_NT: Tensor | None
    train: int
    sha256: str

    @classmethod
    def of(cls, corpus: Corpus, held_out: Corpus) -> Text:
        """Two corpora as one text."""
        assert corpus.seq_len == held_out.seq_len
        masks = [
            part.mask if part.mask is not None else torch.ones_like(part.input_ids, dtype=torch.bool)
            for part in (corpus, held_out)
        ]
        return cls(
            ids_NT=torch.cat([corpus.input_ids, held_out.input_ids]),
            mask_NT=None if corpus.mask is None and held_out.mask is None else torch.cat(masks),
            train=len(corpus),
            sha256=f"{corpus.sha256}-{held_out.sha256}",
        )

    @property
    def held_out(self) -> int:
        """Sequences that are not trained on."""
        return len(self.ids_NT) - self.train

    @property
    def seq_len(self) -> int:
        """Tokens a sequence, with padding."""
        return int(self.ids_NT.shape[1])
