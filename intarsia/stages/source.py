"""What the stages of one call share: a checkpoint and, once asked for, its model in memory and its calibration text."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from intarsia.building.loaded_model import Resident
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.data.corpus import Corpus
from intarsia.data.text import TextParts, draw
from intarsia.options import TextSpec
from intarsia.progress import Progress
from intarsia.stages.placement import placement, refuse_self_text
from intarsia.stages.setup import load_tokenizer


class Source:
    """A model to work on. Nothing heavy is read before it is asked for, and nothing twice.

    Attributes:
        model: what the user calls it; `revision` of a hub id.
        calibration: the specification of the text; `tokens`, `seq_len` and `seed` of it.
        dtype_name: as the user gave it, or None for the checkpoint's own.
        placement: where the model and its hidden states are.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        calibration: str | Sequence[str],
        tokens: int,
        seq_len: int,
        seed: int,
        device: str | None,
        dtype: str | None,
        devices: Sequence[str] = (),
        stream: bool = False,
        memory_bytes: int | None = None,
        progress: Progress,
    ) -> None:
        """Open the checkpoint.

        Raises:
            UserError: there is no such model, device or dtype.
        """
        self.model, self.revision = model, revision
        self.calibration = calibration
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.placement = placement(
            device=device, devices=devices, dtype=dtype, stream=stream, memory_bytes=memory_bytes
        )
        self.device: torch.device = self.placement.device
        self.dtype, self.dtype_name = self.placement.dtype, dtype
        self.progress = progress
        self.checkpoint = open_checkpoint(model, revision=revision, progress=progress)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return load_tokenizer(self.checkpoint)

    @cached_property
    def sha256(self) -> str:
        """The hash of its weights, all of them finite."""
        return scan(self.checkpoint, self.progress)

    @cached_property
    def resident(self) -> Resident:
        """The model in memory; of a streamed one all but its layers."""
        return self.placement.resident(self.checkpoint)

    @cached_property
    def parts(self) -> TextParts:
        """The text, in three disjoint parts.

        Raises:
            UserError: it cannot be read or is too short.
        """
        sources = (self.calibration,) if isinstance(self.calibration, str) else tuple(self.calibration)
        text = TextSpec(sources=sources, tokens=self.tokens, seq_len=self.seq_len, seed=self.seed)
        return draw(text, self.tokenizer, writer=self._writer, writer_key=self.sha256)

    @property
    def corpus(self) -> Corpus:
        """The calibration text.

        Raises:
            UserError: it cannot be read or is too short.
        """
        return self.parts.calibration

    def _writer(self) -> PreTrainedModel:
        if self.placement.stream:
            raise refuse_self_text("--calibration")
        return self.resident.model

    @property
    def in_memory(self) -> bool:
        """Whether the model is loaded."""
        return "resident" in self.__dict__

    def release(self) -> None:
        """Let go of the model; it is loaded anew when it is asked for again."""
        if self.__dict__.pop("resident", None) is not None:
            gc.collect()  # layers at rest know where they are kept, and are known there
