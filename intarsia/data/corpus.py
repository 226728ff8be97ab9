"""Text as token sequences of one length: packed without padding, pinned by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.checkpoint.files import give_back
from intarsia.data.conversations import Conversation, render
from intarsia.errors import UserError
from intarsia.progress import current


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """N sequences of T tokens.

    `input_ids` [N, T] int64; `mask` [N, T] bool, True at real tokens, None when all are real (padding is on the
    right); `sha256` is the hash of ids and mask; `documents` is the number of source documents.
    """

    input_ids: Tensor
    mask: Tensor | None
    description: str
    sha256: str
    documents: int

    @classmethod
    def of(cls, input_ids: Tensor, *, mask: Tensor | None = None, description: str, documents: int) -> Corpus:
        """A corpus with its computed hash."""
        input_ids = input_ids.to(torch.int64).contiguous()
        digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
        digest.update(input_ids.numpy().astype("<i8").tobytes())
        if mask is not None:
            mask = mask.to(torch.bool).contiguous()
            assert mask.shape == input_ids.shape, "one mask entry per token"
            assert not bool((mask[:, 1:] & ~mask[:, :-1]).any()), "padding is on the right"
            digest.update(mask.numpy().tobytes())
        return cls(
            input_ids=input_ids, mask=mask, description=description, sha256=digest.hexdigest(), documents=documents
        )

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def seq_len(self) -> int:
        """Tokens per sequence, including padding."""
        return int(self.input_ids.shape[1])

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    def batches(self, n_sequences: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The sequences in order, at most `n_sequences` at a time, as (ids, mask or None)."""
        assert n_sequences > 0
        for start in range(0, len(self), n_sequences):
            part = slice(start, start + n_sequences)
            yield self.input_ids[part], None if self.mask is None else self.mask[part]

    def take(self, n: int) -> Corpus:
        """The first n sequences."""
        assert 1 <= n <= len(self)
        return self._part(slice(0, n), f"the first {n} sequences of {self.description}")

    def first(self, tokens: int) -> Corpus:
        """The first sequences, at most `tokens` tokens together, and at least one sequence; itself if that is all."""
        number = max(1, tokens // self.seq_len)
        return self.take(number) if number < len(self) else self

    def split(self, fraction: float) -> tuple[Corpus, Corpus]:
        """The first `fraction` of the sequences, and the rest; at least one each.

        Raises:
            UserError: there is only one sequence.
        """
        assert 0.0 < fraction < 1.0
        if len(self) < 2:
            raise UserError(
                f"corpus {self.description}: expected at least 2 sequences, to hold some out; found {len(self)}.",
                "Give more tokens, or a smaller sequence length.",
            )
        n = min(max(round(len(self) * fraction), 1), len(self) - 1)
        rest = len(self) - n
        return self.take(n), self._part(slice(n, None), f"the last {rest} sequences of {self.description}")

    def _part(self, part: slice, description: str) -> Corpus:
        mask = None if self.mask is None else self.mask[part]
        return Corpus.of(self.input_ids[part], mask=mask, description=description, documents=self.documents)


def tokenize(
    documents: Iterable[str | Conversation],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int = 0,
    shuffle: bool,
    description: str = "text",
    least: int | None = None,
) -> Corpus:
    """Pack documents into `tokens // seq_len` sequences.

    Each document is tokenised as a whole, without special tokens; documents are joined by the EOS token. A sequence
    begins with BOS only if the tokenizer adds one by default.

    A conversation is formatted by the model's chat template, with special tokens. A sequence of conversations begins
    with the start of one, has nothing between them, and truncates the last one.

    Args:
        tokens: number of tokens, including BOS.
        seed: of the choice of sequences with `shuffle`.
        shuffle: take sequences from the whole text in random order; otherwise its head, in order.
        description: the name of the text in the corpus and in messages.
        least: least number of sequences, if fewer than requested are acceptable.

    Raises:
        UserError: the text is too short (the message has its number of tokens), or holds a token without an embedding
            in the model (see `limited`).
    """
    if seq_len < 2 or tokens < seq_len:
        raise UserError(
            f"sizes of {description}: "
            "expected a sequence length of at least 2, and tokens for at least one sequence; "
            f"found a sequence length of {seq_len} and {tokens} tokens.",
            "Give more tokens or shorter sequences.",
        )
    alone, bos = tokenizer("a")["input_ids"], [tokenizer.bos_token_id]
    bos = bos if alone[:1] == bos else []  # if it adds one by default
    body = seq_len - len(bos)
    wanted = tokens // seq_len
    stream, talks, count = _token_stream(documents, tokenizer, seq_len, None if shuffle else wanted * body, description)
    give_back()  # tokenising frees many small blocks, many times the size of the text
    of_text, least = stream.size // body, wanted if least is None else least
    there = of_text + len(talks)
    if there < least:
        most = f" Use at most {there * seq_len} tokens," if there else " Use shorter sequences,"
        raise UserError(
            f"{description}: expected at least {least * body} tokens ({least} sequences of {seq_len}); "
            f"found {stream.size + len(talks) * seq_len} tokens.",
            f"Give a longer text.{most} or several sources.",
        )
    windows = torch.from_numpy(stream[: of_text * body].reshape(of_text, body))
    if talks:
        whole = torch.tensor(bos, dtype=torch.int32).expand(of_text, len(bos))
        windows, bos = torch.cat([torch.cat([whole, windows], dim=1), torch.from_numpy(np.stack(talks))]), []
    chosen = torch.arange(min(wanted, there))
    if shuffle:
        chosen = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:wanted]
    first = torch.tensor(bos, dtype=torch.int64).expand(len(chosen), len(bos))
    ids = torch.cat([first, windows[chosen].to(torch.int64)], dim=1)
    check_ids(int(ids.max()), tokenizer, description)
    return Corpus.of(ids, description=description, documents=count)


def limited(tokenizer: Any, rows: int) -> Any:
    """A tokenizer limited to the rows of the embedding: a text with a token beyond them is refused."""
    tokenizer.embedding_rows = rows
    return tokenizer


def check_ids(highest: int, tokenizer: Any, description: str) -> None:
    """Refuse a text whose highest token id is beyond the rows that the tokenizer is limited to.

    Raises:
        UserError: it is.
    """
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is not None and highest >= rows:
        raise UserError(
            f"{description} holds the token {tokenizer.convert_ids_to_tokens(highest)!r} with id {highest}, but the "
            f"embedding has {rows} rows.",
            "Use the model's own tokenizer, or resize its embedding.",
        )


def _token_stream(
    documents: Iterable[str | Conversation], tokenizer: Any, seq_len: int, enough: int | None, description: str
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """All tokens of the texts, sequences of conversations, and the number of documents read.

    Args:
        enough: number of tokens needed; None reads everything.
    """
    pieces: list[np.ndarray] = []
    talks: list[np.ndarray] = []
    talk: list[np.ndarray] = []
    count = size = 0
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    given, template = iter(documents), bool(getattr(tokenizer, "chat_template", None))
    # A text file is one large document, so that a batch of one avoids reading too much. Small documents are faster
    # in batches.
    while (batch := list(islice(given, 1 if count == 0 else 256))) and (enough is None or size < enough):
        if count == 0 and isinstance(batch[0], Conversation):
            form = "the model's chat template" if template else "speakers' names, without a chat template"
            current().say(f"{description}: conversations (column {batch[0].columns}), formatted with {form}")
        texts = [
            each if isinstance(each, str) else render(each, tokenizer) if template else each.plain() for each in batch
        ]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(batch, rows, strict=True):
            if template and isinstance(document, Conversation):
                talk.append(np.asarray(ids, dtype=np.int32))
                if sum(piece.size for piece in talk) >= seq_len:
                    talks.append(np.concatenate(talk)[:seq_len])
                    talk, size = [], size + seq_len
            else:
                piece = np.asarray((eos if pieces else []) + ids, dtype=np.int32)
                pieces.append(piece)
                size += piece.size
            count += 1
    return (np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)), talks, count
