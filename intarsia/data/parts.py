"""The text of a job in three disjoint parts: one to calibrate on, one to choose by, one to test on.

Of a file or data set the parts are one draw, cut up. Text that the model writes itself is written for each part when
that is first needed, with a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, TypeAlias

import torch

from intarsia import progress
from intarsia.data.corpus import Corpus, tokenize
from intarsia.data.self_text import self_corpus
from intarsia.data.sources import documents
from intarsia.errors import check
from intarsia.options import TextSpec

SELF = "self"
Part: TypeAlias = Literal["calibration", "test", "selection"]

_HELD_OUT = 8  # the test part and the selection part each have this fraction of the calibration part's sequences
_MOST_READ = 16 * 1024 * 1024  # bytes of one source that are tokenised, unless more is needed
_BYTES_A_TOKEN = 32  # generous: enough also where tokens are long


class TextParts:
    """Each part is read or written when it is first asked for."""

    def __init__(
        self, spec: TextSpec, tokenizer: Any, *, writer: Callable[[], Any] | None = None, cache_key: str | None = None
    ) -> None:
        """
        Args:
            tokenizer: the model's.
            writer: gives the model that writes, for `self`.
            cache_key: identifies that model's weights (their hash); without it nothing that it writes is cached.

        Raises:
            UserError: there are more sources than sequences.
        """
        self.spec, self._tokenizer, self._writer, self._cache_key = spec, tokenizer, writer, cache_key
        self._drawn: dict[int, Corpus] = {}
        number = spec.tokens // spec.seq_len
        held_out = max(number // _HELD_OUT, 1)
        self._sizes: dict[Part, int] = {"calibration": number, "test": held_out, "selection": held_out}
        few = f"--tokens {spec.tokens} is {number} sequences of {spec.seq_len} for {len(spec.sources)} sources."
        check((number >= len(spec.sources), few, "Give more --tokens, a smaller --seq-len, or fewer sources."))

    @property
    def written(self) -> bool:
        """Whether the model writes some of it itself."""
        return SELF in self.spec.sources

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the test part, and of the selection part."""
        return self._sizes["test"] * self.spec.seq_len

    @cached_property
    def calibration(self) -> Corpus:
        """What models are calibrated on and fitted to.

        Raises:
            UserError: a source cannot be read, or is too short.
        """
        found = self._part("calibration")
        assert found is not None
        return found

    @cached_property
    def test(self) -> Corpus | None:
        """What results are tested on; None where the sources have no more text."""
        return self._part("test")

    @cached_property
    def selection(self) -> Corpus | None:
        """What is chosen by; None where the sources have no more text."""
        return self._part("selection")

    def _part(self, part: Part) -> Corpus | None:
        """Sources take turns, so that every stretch holds equal parts of each."""
        found: list[tuple[int, int, torch.Tensor]] = []
        count = 0
        with progress.current().task("calibration text", total=len(self.spec.sources)) as task:
            for index, source in enumerate(self.spec.sources):
                task.note(source)
                wanted = self._share(index, part)
                corpus = self._own(part, wanted) if source == SELF else self._cut(index, part)
                if corpus is None:
                    return None
                first = self._first(index, part)
                found += [(first + row, index, ids) for row, ids in enumerate(corpus.input_ids)]
                count += corpus.documents
                task.advance()
        ids = torch.stack([ids for _, _, ids in sorted(found, key=lambda each: each[:2])])
        names = ", ".join(self.spec.sources)
        if part != "calibration":
            names = "further text that the model wrote itself" if names == SELF else f"held-out part of {names}"
        return Corpus.of(ids, description=names, documents=count)

    def _first(self, index: int, part: Part) -> int:
        """Sequences of a source that the parts before take."""
        return self._until(index, self._before(part))

    def _share(self, index: int, part: Part) -> int:
        """Sequences of a source in a part."""
        return self._until(index, self._before(part) + self._sizes[part]) - self._first(index, part)

    def _before(self, part: Part) -> int:
        names: Sequence[Part] = list(self._sizes)
        return sum(self._sizes[name] for name in names[: names.index(part)])

    def _until(self, index: int, total: int) -> int:
        """Of so many sequences, those of one source."""
        number = len(self.spec.sources)
        return total // number + (index < total % number)

    def _own(self, part: Part, wanted: int) -> Corpus | None:
        seq_len, seed = self.spec.seq_len, self.spec.seed
        if part != "calibration":  # not the next seed, which another job may calibrate with
            seed = int.from_bytes(sha256(f"{part} {seed}".encode()).digest()[:6], "big")
        check((self._writer is not None, "There is no model to write the calibration text.", "Give a text file."))
        if wanted == 0:
            return Corpus.of(torch.empty(0, seq_len, dtype=torch.int64), description=SELF, documents=0)
        assert self._writer is not None
        return self_corpus(
            self._writer,
            self._tokenizer,
            tokens=wanted * seq_len,
            seq_len=seq_len,
            seed=seed,
            cache_key=self._cache_key,
            progress=progress.current(),
        )

    def _cut(self, index: int, part: Part) -> Corpus | None:
        """A part of a file or data set; None where it is too short for that."""
        drawn = self._draw(index)
        first = self._first(index, part)
        rows = drawn.input_ids[first : first + self._share(index, part)]
        if len(rows) < self._share(index, part):
            return None
        return Corpus.of(rows, description=drawn.description, documents=drawn.documents)

    def _draw(self, index: int) -> Corpus:
        """All parts of a source, or as many as it has."""
        if index not in self._drawn:
            source, seq_len = self.spec.sources[index], self.spec.seq_len
            total = self._until(index, sum(self._sizes.values())) * seq_len
            limit = max(_MOST_READ, _BYTES_A_TOKEN * total)

            def draw(tokens: int, *, short_is_fine: bool) -> Corpus:
                return tokenize(
                    documents(source, limit_bytes=limit, seed=self.spec.seed),
                    self._tokenizer,
                    tokens=tokens,
                    seq_len=seq_len,
                    seed=self.spec.seed,
                    shuffle=True,
                    description=source,
                    short_is_fine=short_is_fine,
                )

            found = draw(total, short_is_fine=True)
            if len(found) < self._share(index, "calibration"):  # say how much there is
                draw(self._share(index, "calibration") * seq_len, short_is_fine=False)
            self._drawn[index] = found
        return self._drawn[index]
