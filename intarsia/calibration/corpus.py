"""Text as pinned token sequences.

The same source, tokenizer, sizes and seed give the same bytes; the hash says so. Sequences are packed full, so there
is no padding unless a corpus is built with a mask (then padding is on the right, and never counts anywhere).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.calibration.sources import documents
from intarsia.errors import UserError
from intarsia.progress import Progress, Silent

_MOST_READ = 16 * 1024 * 1024  # bytes of one source that are tokenised at most (a few seconds), unless more is needed
_BYTES_A_TOKEN = 32  # generous: enough text for the tokens wanted, also where tokens are long


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


def tokenize(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int = 0,
    shuffle: bool,
    description: str = "text",
    short_is_fine: bool = False,
) -> Corpus:
    """Documents packed into exactly `tokens // seq_len` sequences.

    Each document is tokenised whole and without special tokens; documents are joined by the EOS token. A sequence
    begins with BOS only where the tokenizer puts one by itself.

    Args:
        documents: the texts.
        tokenizer: a `transformers` tokenizer.
        tokens: how many are wanted, BOS included.
        seq_len: tokens a sequence.
        seed: decides which sequences are taken with `shuffle`.
        shuffle: take sequences from everywhere in the text, in random order; otherwise its head, in order.
        description: names the text in the corpus and in messages.
        short_is_fine: give as many sequences as there are, if there is one.

    Raises:
        UserError: the text is too short; the message says how many tokens it has.
    """
    if seq_len < 2 or tokens < seq_len:
        raise UserError.of(
            where=f"sizes of {description}",
            expected="a sequence length of at least 2, and at least as many tokens as one sequence has",
            found=f"a sequence length of {seq_len} and {tokens} tokens",
            remedy="Ask for more tokens or shorter sequences.",
        )
    bos = _own_bos(tokenizer)
    body = seq_len - len(bos)
    wanted = tokens // seq_len
    stream, count = _token_stream(documents, tokenizer, None if shuffle else wanted * body)
    there = stream.size // body
    if there < wanted and (there == 0 or not short_is_fine):
        most = f" Pass at most {there * seq_len} tokens," if there else " Use shorter sequences,"
        raise UserError.of(
            where=description,
            expected=f"at least {wanted * body} tokens ({wanted} sequences of {seq_len})",
            found=f"{stream.size} tokens",
            remedy=f"Pass a longer text.{most} or several sources.",
        )
    chosen = torch.arange(min(wanted, there))
    if shuffle:
        chosen = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:wanted]
    windows = torch.from_numpy(stream[: there * body].reshape(there, body))[chosen].to(torch.int64)
    first = torch.tensor(bos, dtype=torch.int64).expand(len(windows), len(bos))
    return Corpus.of(torch.cat([first, windows], dim=1), description=description, documents=count)


def load_corpus(
    spec: str | Sequence[str],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    model_for_self: Callable[[], Any] | None = None,
    self_cache_key: str | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """A calibration corpus from one spec or several, equal parts of each, mixed evenly.

    With files, asking for more tokens gives the same sequences first and then others, up to half a million tokens a
    source (behind that, another part of a large file may be read). Text that a model writes has no such order.

    Args:
        spec: see `intarsia.calibration.source_spec`; `self` is text that the model writes itself. Several are a list,
            or separated by commas.
        tokenizer: the model's.
        tokens: how many, over all sources.
        seq_len: tokens a sequence.
        seed: decides which parts of the sources are taken, and what the model writes.
        model_for_self: gives the model that writes, for `self`; only called when the text is not cached.
        self_cache_key: identifies that model's weights (their hash); without it nothing is cached.
        progress: shown while text is read and written.

    Raises:
        UserError: something is wrong with a source, or the sources are too short.
    """
    progress = progress or Silent()
    specs = _specs(spec)
    total = tokens // max(seq_len, 1)
    if total < len(specs):
        raise UserError.of(
            where=f"calibration text {', '.join(specs)}",
            expected=f"at least one sequence of {seq_len} tokens for each of {len(specs)} sources",
            found=f"{tokens} tokens, which is {total} sequences",
            remedy="Ask for more tokens, shorter sequences, or fewer sources.",
        )
    parts = []
    with progress.task("calibration text", total=len(specs)) as task:
        for i, one in enumerate(specs):
            task.note(one)
            share = (total // len(specs) + (i < total % len(specs))) * seq_len
            if one == "self":
                parts.append(_self(model_for_self, self_cache_key, tokenizer, share, seq_len, seed, progress))
            else:
                limit = max(_MOST_READ, _BYTES_A_TOKEN * share)
                texts = documents(one, limit_bytes=limit, seed=seed)
                parts.append(
                    tokenize(texts, tokenizer, tokens=share, seq_len=seq_len, seed=seed, shuffle=True, description=one)
                )
            task.advance()
    # Sources take turns, so that every stretch of the corpus holds equal parts of each.
    order = sorted((i, p) for p, part in enumerate(parts) for i in range(len(part)))
    ids = torch.stack([parts[p].input_ids[i] for i, p in order])
    return Corpus.of(ids, description=", ".join(specs), documents=sum(part.documents for part in parts))


def _specs(spec: str | Sequence[str]) -> list[str]:
    if not isinstance(spec, str):
        specs = list(spec)
    else:
        specs = [spec] if Path(spec).is_file() else [one.strip() for one in spec.split(",")]
    if not specs or not all(specs):
        raise UserError.of(
            where="calibration text",
            expected="one source, or several separated by commas",
            found=repr(spec),
            remedy="Pass a text file, hub:DATASET[/CONFIG]:SPLIT:COLUMN, or self.",
        )
    return specs


def _self(
    model: Callable[[], Any] | None,
    key: str | None,
    tokenizer: Any,
    tokens: int,
    seq_len: int,
    seed: int,
    progress: Progress,
) -> Corpus:
    from intarsia.calibration.selftext import self_corpus

    if model is None:
        raise UserError.of(
            where="calibration text self",
            expected="a model that writes the text",
            found="none",
            remedy="Pass a text file, or the model (model_for_self).",
        )
    return self_corpus(model, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed, cache_key=key, progress=progress)


def _own_bos(tokenizer: Any) -> list[int]:
    """BOS as a list of one, if the tokenizer puts it before a text without being asked; else empty."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _token_stream(documents: Iterable[str], tokenizer: Any, enough: int | None) -> tuple[np.ndarray, int]:
    """All tokens in a row (at least `enough` of them, if there are), and the number of documents read."""
    pieces: list[np.ndarray] = []
    count = size = 0
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = iter(documents)
    # A text file is one large document; then a batch should not read on. Small documents are quicker together.
    while (batch := list(islice(texts, 1 if count == 0 else 256))) and (enough is None or size < enough):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            piece = np.asarray((eos if count else []) + ids, dtype=np.int32)
            pieces.append(piece)
            size += piece.size
            count += 1
    return (np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)), count
