"""`Job` for the verbs that take their options one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from intarsia.commands.job import Job
from intarsia.data.corpus import Corpus
from intarsia.options import ModelRef, Runtime, TextSpec
from intarsia.progress import Progress


class Source(Job):
    """A model to work on, with its calibration text."""

    def __init__(
        self,
        model: str,
        *,
        calibration: str | Sequence[str],
        tokens: int,
        seq_len: int,
        progress: Progress,
        **options: Any,
    ) -> None:
        """
        Raises:
            UserError: there is no such model, device or dtype.
        """
        self.progress = progress
        names = calibration
        if isinstance(calibration, str) and not Path(calibration).is_file():
            names = [name.strip() for name in calibration.split(",")]
        text = TextSpec(sources=tuple([names] if isinstance(names, str) else names), tokens=tokens, seq_len=seq_len)
        text = replace(text, seed=options.pop("seed"))
        reference = ModelRef(model=model, revision=options.pop("revision"))
        super().__init__(reference, None, Runtime(**options))
        self._text = text

    @property
    def tokens(self) -> int:
        """Of the calibration text."""
        return self.spec.tokens

    @property
    def seq_len(self) -> int:
        """Of the calibration text."""
        return self.spec.seq_len

    @seq_len.setter
    def seq_len(self, seq_len: int) -> None:
        self._text = replace(self.spec, seq_len=seq_len)

    @property
    def corpus(self) -> Corpus:
        """The calibration text."""
        return self.text.calibration
