"""How far a candidate's next tokens are from the base's, with little kept of the base.

Of each position the base's `TOP` likeliest tokens are kept, and the rest is one bucket: 8 bytes for each of them,
where the base's hidden state and one more product with the head a trial would cost as much time again as several
layers do. The divergence over these outcomes is a lower bound of the full one, and 0 where the full one is.

Shapes: N positions, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.healing.losses import top_k_kl, top_k_of

TOP = 64
_CPU_ROWS = 32
_GPU_ROWS = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """Of every position the base's likeliest tokens: `log_p_NK` (float32) and `index_NK` (int32)."""

    log_p_NK: Tensor
    index_NK: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor) -> Teacher:
        """From the base's logits."""
        kept = [top_k_of(block_NV, min(TOP, block_NV.shape[-1])) for block_NV in logits_NV.split(_rows(logits_NV))]
        return cls(
            log_p_NK=torch.cat([log_p for log_p, _ in kept]),
            index_NK=torch.cat([index for _, index in kept]).to(torch.int32),
        )

    def divergence(self, logits_NV: Tensor) -> Tensor:
        """Of every position, in nats: float32 `[N]`."""
        step = _rows(logits_NV)
        blocks = zip(self.log_p_NK.split(step), self.index_NK.split(step), logits_NV.split(step), strict=True)
        return torch.cat([top_k_kl(log_p_NK, index_NK, block_NV) for log_p_NK, index_NK, block_NV in blocks])


def _rows(logits_NV: Tensor) -> int:
    return _CPU_ROWS if logits_NV.device.type == "cpu" else _GPU_ROWS
