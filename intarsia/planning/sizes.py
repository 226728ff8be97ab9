"""What a model's parts and the work on them take in memory: formulas alone, for a checkpoint or a shape on paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from intarsia.anatomy.spec import PARTS, Anatomy
from intarsia.calibration.writing import Sampling, rows_at_once
from intarsia.healing.fit_memory import fit_bytes
from intarsia.healing.settings import RIDGES

if TYPE_CHECKING:
    import torch

    from intarsia.checkpoint.reader import Checkpoint

BASE_BYTES = 465 * 10**6
"""Python with torch and transformers, and what reading a text leaves behind (measured on Linux)."""

STREAMED_LAYERS = 2.0
"""Layers in memory where one is used while the next is read."""

FITTED_LAYERS = 1.5
"""The same while a layer is fitted: none is read meanwhile, and it has new read-outs beside its own."""

_DEVICE_LAYERS = 0.5  # more on a device with memory of its own, whose allocator keeps what is freed (not measured)

LOGIT_BYTES = 256 * 1024**2
"""Logits that losses are taken from at a time, at most, unless one sequence has more (`LayerStream.losses`)."""

STREAMED_LOGIT_BYTES = LOGIT_BYTES // 2
"""The same when the perplexity of a streamed model is measured (`intarsia.evaluation.chain`)."""

JUDGED_TOKENS = 4096
"""Tokens of a forward pass of the whole model, when its perplexity is measured."""

_SHARE_OF_FREE = 0.4  # as in `intarsia.calibration.room`
_CPU_BATCH, _CUDA_BATCH = 2048, 32768  # as in `intarsia.calibration.batches`
_ROW_COPIES = 6  # float32 entries of a token in a layer that are there at once, in widths of its MLP
_TOKENIZER_COPIES = 14  # what a tokenizer takes in memory, in sizes of its file (measured)
_TOKENIZER_ENTRY = 1000  # the same for an entry of the vocabulary, where there is no file (measured)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a model's parts in the dtype that it runs in. `outside`: embedding, final norm and head.

    `mapped`: on the CPU these stay in their files, and are in memory while they are used.
    """

    anatomy: Anatomy
    itemsize: int
    layer_bytes: int
    outside_bytes: int
    tokenizer_bytes: int
    mapped: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Sizes:
        """Of a checkpoint that runs in that dtype, or in its own."""
        anatomy = checkpoint.anatomy
        stored = checkpoint.headers[f"{anatomy.family.embedding_module}.weight"].dtype
        itemsize = (dtype or stored).itemsize
        outside = sum(checkpoint.headers[name].numel for name in checkpoint.outside_names())
        return cls(
            anatomy=anatomy,
            itemsize=itemsize,
            layer_bytes=anatomy.layer_parameters * itemsize,
            outside_bytes=outside * itemsize,
            tokenizer_bytes=_tokenizer_bytes(checkpoint.folder / "tokenizer.json", anatomy.vocabulary),
            mapped=dtype in (None, stored),
        )

    @classmethod
    def on_paper(cls, anatomy: Anatomy, *, itemsize: int = 2) -> Sizes:
        """Of a config alone."""
        tables = anatomy.vocabulary * anatomy.width * (1 if anatomy.tied else 2)
        return cls(
            anatomy=anatomy,
            itemsize=itemsize,
            layer_bytes=anatomy.layer_parameters * itemsize,
            outside_bytes=(tables + anatomy.width) * itemsize,
            tokenizer_bytes=anatomy.vocabulary * _TOKENIZER_ENTRY,
        )

    @property
    def base_bytes(self) -> int:
        """What a process takes before the model."""
        return BASE_BYTES + self.tokenizer_bytes

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return self.outside_bytes + self.anatomy.n_layers * self.layer_bytes

    def hidden(self, tokens: int) -> int:
        """Hidden states of so many tokens at one depth."""
        return tokens * self.anatomy.width * self.itemsize

    def batch(self, tokens: int) -> int:
        """What a layer makes of a batch on its way."""
        anatomy = self.anatomy
        widest = max([anatomy.width, *(anatomy.cut_size(anatomy.writer(part)) for part in PARTS)])
        return _ROW_COPIES * tokens * widest * 4

    def logits(self, tokens: int, seq_len: int) -> int:
        """Logits that are there at once when losses of a batch are taken."""
        one = seq_len * self.anatomy.vocabulary * self.itemsize
        return min(max(1, LOGIT_BYTES // one), max(1, tokens // seq_len)) * one

    def writing(self, tokens: int, seq_len: int) -> int:
        """What a model that writes so much text keeps at once: keys and values, those of one layer once more for every
        query head, and logits of one position."""
        anatomy = self.anatomy
        head = 2 * anatomy.head_dim * seq_len * self.itemsize
        row = anatomy.n_layers * anatomy.n_kv_heads * head
        rows = min(tokens // seq_len, rows_at_once(row, Sampling()))
        return rows * (row + anatomy.n_query_heads * head + 3 * anatomy.vocabulary * self.itemsize)

    def fit(self, tokens: int, held_out: int, *, stream: bool) -> int:
        """What the closed form of one read-out needs: moments, or few tokens themselves; of streamed models in files
        what is not needed for a while."""
        behind = any(self.anatomy.norm_after(part) for part in PARTS)
        return max(
            fit_bytes(
                self.anatomy.cut_size(self.anatomy.writer(part)),
                self.anatomy.width,
                tokens=tokens,
                held_out=held_out,
                itemsize=self.itemsize,
                in_files=stream,
                strengths=len(RIDGES) if behind else 0,
            )
            for part in PARTS
        )

    def fitted(self, layers: int, *, attention: int) -> int:
        """Fitted read-outs, which a recipe keeps in float32: down_proj of so many layers, o_proj of some."""
        sizes = {part: self.anatomy.cut_size(self.anatomy.writer(part)) * self.anatomy.width * 4 for part in PARTS}
        return layers * sizes["mlp"] + attention * sizes["attention"]

    def flops(self, tokens: int, seq_len: int) -> float:
        """Of one layer over so many tokens: two for each weight, and those of causal attention."""
        attention = 2 * seq_len * self.anatomy.n_query_heads * self.anatomy.head_dim
        return float(tokens) * (2 * self.anatomy.layer_parameters + attention)


@dataclass(frozen=True, kw_only=True)
class Held:
    """How a model is held, and on what.

    Attributes:
        apart: the device has memory of its own; else it is the host's.
        devices: over how many the layers are laid.
        memory_bytes: what hidden states may take of the host's.
    """

    apart: bool
    stream: bool
    devices: int
    memory_bytes: int
    batch_tokens: int

    @classmethod
    def on(
        cls,
        device: torch.device,
        *,
        stream: bool = False,
        memory_bytes: int | None = None,
        devices: int = 1,
        batch_tokens: int | None = None,
    ) -> Held:
        """On a device of this machine."""
        apart = device.type == "cuda"
        free = int(psutil.virtual_memory().available * _SHARE_OF_FREE)
        return cls(
            apart=apart,
            stream=stream,
            devices=devices,
            memory_bytes=free if memory_bytes is None else memory_bytes,
            batch_tokens=batch_tokens or (_CUDA_BATCH if apart else _CPU_BATCH),
        )

    def weights(self, sizes: Sizes, *, made: int = 0, layers: float = STREAMED_LAYERS, outside: bool = True) -> int:
        """Weights in memory, on the fullest device.

        Args:
            made: layers that are made besides the original ones; of a streamed model they are made when needed.
            layers: of a streamed model, how many are there at once.
            outside: whether embedding and head are used, which else may be in their files alone.
        """
        if self.stream:
            there = outside or self.apart or not sizes.mapped
            layers += _DEVICE_LAYERS if self.apart else 0.0
            return int(layers * sizes.layer_bytes) + (sizes.outside_bytes if there else 0)
        at_once = sizes.anatomy.n_layers + made
        return sizes.outside_bytes + -(-at_once // self.devices) * sizes.layer_bytes


def _tokenizer_bytes(path: Path, vocabulary: int) -> int:
    return _TOKENIZER_COPIES * path.stat().st_size if path.is_file() else vocabulary * _TOKENIZER_ENTRY
