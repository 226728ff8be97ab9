"""Streaming statistics of a layer. Everything accumulates in float32 or better and counts real tokens alone.

Shape suffixes: `N` tokens of any arrangement, `C` channels of a part, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intarsia.architecture.spec import Part
from intarsia.errors import UserError


@dataclass(kw_only=True)
class ChannelSums:
    """Sums over tokens of |x_c| and x_c squared, for each channel of one part."""

    absolute_C: Tensor | None = None
    squared_C: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor, keep: Tensor | None) -> None:
        """Count the tokens of `x` `[B, T, C]` (or `[B*T, C]`) where `keep` `[B, T]` is True (None: all)."""
        x_NC = x.reshape(-1, x.shape[-1])
        if keep is not None:
            x_NC = x_NC[keep.reshape(-1)]
        absolute_C = x_NC.abs().sum(dim=0, dtype=torch.float32).double()
        squared_C = torch.linalg.vector_norm(x_NC, dim=0, dtype=torch.float32).double().square()
        self.absolute_C = absolute_C if self.absolute_C is None else self.absolute_C + absolute_C
        self.squared_C = squared_C if self.squared_C is None else self.squared_C + squared_C
        self.tokens += x_NC.shape[0]

    def include(self, other: ChannelSums) -> None:
        """Count what another has counted, on other tokens."""
        if other.absolute_C is None or other.squared_C is None:
            return
        self.absolute_C = other.absolute_C if self.absolute_C is None else self.absolute_C + other.absolute_C
        self.squared_C = other.squared_C if self.squared_C is None else self.squared_C + other.squared_C
        self.tokens += other.tokens

    @property
    def mean_absolute_C(self) -> Tensor:
        """E[|x_c|]."""
        assert self.absolute_C is not None and self.tokens > 0
        return self.absolute_C / self.tokens

    @property
    def root_mean_square_C(self) -> Tensor:
        """sqrt(E[x_c^2])."""
        assert self.squared_C is not None and self.tokens > 0
        return (self.squared_C / self.tokens).sqrt()


@dataclass(kw_only=True)
class LayerMeasure:
    """What one layer does on the calibration tokens."""

    cosine_sum: float = 0.0
    tokens: int = 0
    channels: Mapping[Part, ChannelSums] = field(
        default_factory=lambda: {"attention": ChannelSums(), "mlp": ChannelSums()}
    )

    def add_stream(self, before: Tensor, after: Tensor, keep: Tensor | None) -> None:
        """Count a batch of hidden states before and after the layer, `[B, T, D]`."""
        cosine = cosines(before, after, keep)
        self.cosine_sum += float(cosine.sum(dtype=torch.float64))
        self.tokens += cosine.numel()

    def include(self, other: LayerMeasure) -> None:
        """Count what another has counted, on other tokens."""
        self.cosine_sum += other.cosine_sum
        self.tokens += other.tokens
        for part, sums in other.channels.items():
            self.channels[part].include(sums)

    @property
    def influence(self) -> float:
        """Block influence, 1 - E[cos(H^{l-1}, H^l)] (arXiv 2403.03853)."""
        return max(1.0 - self.cosine_sum / self.tokens, 0.0)


def cosines(first: Tensor, second: Tensor, keep: Tensor | None) -> Tensor:
    """Cosine similarity of two `[B, T, D]` tensors at every real token: float32 `[N]`."""
    a_ND = first.reshape(-1, first.shape[-1]).float()
    b_ND = second.reshape(-1, second.shape[-1]).float()
    if keep is not None:
        a_ND, b_ND = a_ND[keep.reshape(-1)], b_ND[keep.reshape(-1)]
    return torch.nn.functional.cosine_similarity(a_ND, b_ND, dim=-1).clamp(-1.0, 1.0)


def require_finite(tensor: Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: naming `where` they appeared.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"{where} has NaN or infinity.",
            "The model overflows in this dtype; try --dtype bfloat16 or float32.",
        )


def last_real(ids: Tensor, mask: Tensor | None) -> Tensor:
    """True at the last real token of each sequence."""
    last = torch.zeros_like(ids, dtype=torch.bool)
    ends = torch.full((ids.shape[0],), ids.shape[1] - 1) if mask is None else mask.sum(dim=1) - 1
    last[torch.arange(ids.shape[0]), ends.to(ids.device)] = True
    return last
