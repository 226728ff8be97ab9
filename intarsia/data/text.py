"""The text of a job, in three disjoint parts of one draw: from files, data sets on the hub, or written by the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia import progress
from intarsia.data.corpus import Corpus, tokenize
from intarsia.data.self_text import self_corpus
from intarsia.data.sources import bytes_for, documents
from intarsia.errors import check
from intarsia.options import TextSpec

SELF = "self"
_SHARE = 8  # selection and test have 1/8 of the calibration's size each


class TextParts:
    """One draw of text. No sequence is in two parts; self-written text is written when a part is requested.

    The sequences of several sources alternate, so that every stretch has equal parts of each.
    """

    def __init__(self, names: Sequence[str], sources: Sequence[_Source], n: int) -> None:
        self._names, self._sources = names, sources
        sizes = (len(source) * len(sources) + i for i, source in enumerate(sources))
        rest = min(sizes) - n
        self._calibration = n
        self._test = n + min(max(1, n // _SHARE), (rest + 1) // 2)
        self._selection = min(self._test + max(1, n // _SHARE), n + rest)

    @cached_property
    def calibration(self) -> Corpus:
        """The text for measuring and fitting: the wanted number of tokens."""
        corpus = self._part(0, self._calibration, ", ".join(self._names))
        assert corpus is not None
        return corpus

    @cached_property
    def test(self) -> Corpus | None:
        """The text for evaluating the result, an eighth of the calibration's size; None if no text is left."""
        itself = list(self._names) == [SELF]
        name = "further text that the model wrote itself" if itself else f"held-out part of {', '.join(self._names)}"
        return self._part(self._calibration, self._test, name)

    @cached_property
    def selection(self) -> Corpus | None:
        """The text for accepting candidates and fits, as large as the test part; None if no text is left."""
        return self._part(self._test, self._selection, f"selection part of {', '.join(self._names)}")

    @property
    def written(self) -> Corpus | None:
        """The self-written text of all parts; None before it is written."""
        return next((each.corpus for each in self._sources if each.is_written), None)

    def _part(self, start: int, end: int, description: str) -> Corpus | None:
        """The sequences from `start` to `end` of the draw."""
        if start >= end:
            return None
        n = len(self._sources)
        parts = [
            iter(source.sequences(len(range(i, start, n)), len(range(i, end, n))))
            for i, source in enumerate(self._sources)
        ]
        ids_NT = torch.stack([next(parts[row % n]) for row in range(start, end)])
        return Corpus.of(ids_NT, description=description, documents=sum(source.documents for source in self._sources))


class _Source:
    """Token sequences of a file or data set, or self-written ones, written all at once when they are requested."""

    def __init__(self, n: int, corpus: Corpus | None = None, write: Callable[[], Corpus] | None = None) -> None:
        self._n, self.corpus, self._write = n, corpus, write
        self.is_written = corpus is None

    def __len__(self) -> int:
        return self._n

    @property
    def documents(self) -> int:
        """The number of documents of the sequences, as far as it is known."""
        return 0 if self.corpus is None else self.corpus.documents

    def sequences(self, start: int, end: int) -> Tensor:
        """The sequences from `start` to `end`."""
        if start >= end:
            return torch.empty(0, 0, dtype=torch.int64)
        if self.corpus is None:
            assert self._write is not None
            self.corpus = self._write()
        return self.corpus.input_ids[start:end]


def draw(
    text: TextSpec, tokenizer: Any, *, writer: Callable[[], Any] | None = None, writer_key: str | None = None
) -> TextParts:
    """Draw the text of a job.

    A larger draw from files starts with the same sequences, up to half a million tokens per source (beyond that,
    another part of a large file may be read). This does not hold for self-written text.

    Args:
        writer: loads the model that writes `self`; only called if the text is not cached.
        writer_key: the hash of that model's weights; None disables the cache.

    Raises:
        UserError: a source cannot be used, or the sources are too short.
    """
    names, n = _names(text.sources), text.length // text.seq_len
    check(
        (
            n >= len(names),
            f"The calibration text has {n} sequences of {text.seq_len} tokens, fewer than its {len(names)} sources.",
            "Give more tokens, shorter sequences, or fewer sources.",
        ),
        (
            writer is not None or SELF not in names,
            "The calibration text is `self`, but there is no model to write it.",
            "Give a text file.",
        ),
    )

    def source(name: str, least: int, most: int) -> _Source:
        if name == SELF:
            assert writer is not None
            size: dict[str, Any] = {"n": most, "seq_len": text.seq_len, "seed": text.seed}
            return _Source(most, write=lambda: self_corpus(writer, tokenizer, cache_key=writer_key, **size))
        tokens = most * text.seq_len
        corpus = tokenize(
            documents(name, limit_bytes=bytes_for(tokens), seed=text.seed),
            tokenizer,
            tokens=tokens,
            seq_len=text.seq_len,
            seed=text.seed,
            shuffle=True,
            description=name,
            least=least,
        )
        return _Source(len(corpus), corpus)

    total, sources = n + 2 * max(1, n // _SHARE), []
    read_now = 1.0 - names.count(SELF) / len(names)  # the model writes when a part is requested
    with progress.current().task("calibration text", total=len(names), units=read_now) as task:
        for i, name in enumerate(names):
            task.note(name)
            sources.append(source(name, *(len(range(i, size, len(names))) for size in (n, total))))
            task.advance()
    return TextParts(names, sources, n)


def _names(sources: Sequence[str]) -> list[str]:
    """The sources one by one: each entry is a file or folder, or several comma-separated names."""
    names = [
        name.strip() for entry in sources for name in ([entry] if entry and Path(entry).exists() else entry.split(","))
    ]
    check(
        (
            bool(names) and all(names),
            f"The calibration text {', '.join(sources)!r} has an empty source.",
            "Give a text file, hub:DATASET[/CONFIG]:SPLIT[:COLUMN], or self.",
        ),
        (
            len(set(names)) == len(names),
            f"The calibration text {', '.join(names)} has a source twice.",
            "Give each once.",
        ),
    )
    return names
