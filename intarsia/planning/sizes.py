"""What a model's parts and the work on them take in memory: formulas alone, for a checkpoint or a shape on paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from intarsia.anatomy.spec import PARTS, Anatomy

if TYPE_CHECKING:
    import torch

    from intarsia.checkpoint.reader import Checkpoint

BASE_BYTES = 450 * 10**6
"""Python with torch, transformers and a tokenizer, before anything is loaded (measured on Linux)."""

STREAMED_LAYERS = 2.5
"""Layers in memory where one is used while the next is read: these two, and the tensor that is being joined."""

LOGIT_BYTES = 256 * 1024**2
"""Logits that losses are taken from at a time, at most, unless one sequence has more (`LayerStream.losses`)."""

JUDGED_TOKENS = 4096
"""Tokens of a forward pass of the whole model, when its perplexity is measured."""

_SHARE_OF_FREE = 0.4  # as in `intarsia.calibration.room`
_CPU_BATCH, _CUDA_BATCH = 2048, 32768  # as in `intarsia.calibration.batches`
_ROW_COPIES = 6  # float32 entries of a token in a layer that are there at once, in widths of its MLP
_GRAM_COPIES = 4  # fitted and held-out moments, the system, its factor
_TRIED = 6  # weights that are judged at once where a norm stands behind a read-out (`intarsia.healing.behind_norm`)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a model's parts in the dtype that it runs in. `outside`: embedding, final norm and head."""

    anatomy: Anatomy
    itemsize: int
    layer_bytes: int
    outside_bytes: int

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
        )

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

    def moments(self, tokens: int, held_out: int) -> int:
        """What the closed form of one read-out needs. Of few tokens the rows are kept, not their moments."""
        features = max(self.anatomy.cut_size(self.anatomy.writer(part)) for part in PARTS)
        width = self.anatomy.width
        behind = any(self.anatomy.norm_behind(part) for part in PARTS)
        # The change, the weight with it, and as it is stored.
        change = (3 + (_TRIED if behind else 0)) * features * width * 4
        if tokens - tokens // held_out <= features // 2:
            return 4 * tokens * (2 * features + width) + 3 * 8 * tokens**2 + change
        return 8 * (_GRAM_COPIES * features**2 + 2 * features * width) + change

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

    def weights(self, sizes: Sizes, *, made: int = 0) -> int:
        """Weights in memory, on the fullest device.

        Args:
            made: layers that are made besides the original ones; of a streamed model they are made when needed.
        """
        if self.stream:
            return sizes.outside_bytes + int(STREAMED_LAYERS * sizes.layer_bytes)
        layers = sizes.anatomy.n_layers + made
        return sizes.outside_bytes + -(-layers // self.devices) * sizes.layer_bytes
