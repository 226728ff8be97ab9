"""Streaming statistics of a layer, and hooks that measure the inputs of its output projections.

Everything accumulates in float32 or better and counts only real tokens. The MLP of a mixture has no single output
projection, so the measure of an expert is the sum of absolute values of its output, times its router weight. The
experts run again for this, one at a time, with the model's routing.

Shape suffixes: `N` tokens of any arrangement, `C` channels of a part, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.errors import UserError


@dataclass(kw_only=True)
class ChannelSums:
    """Sums over tokens of |x_c| and x_c squared, for each channel of one part."""

    absolute_C: Tensor | float = 0.0
    squared_C: Tensor | float = 0.0
    tokens: int = 0

    def add(self, x: Tensor, keep: Tensor | None) -> None:
        """Add the tokens of `x` `[B, T, C]` (or `[B*T, C]`) where `keep` `[B, T]` is True (None: all)."""
        x_NC = x.reshape(-1, x.shape[-1])
        if keep is not None:
            x_NC = x_NC[keep.reshape(-1)]
        self.absolute_C = self.absolute_C + x_NC.abs().sum(dim=0, dtype=torch.float32).double()
        norm_C = torch.linalg.vector_norm(x_NC, dim=0, dtype=torch.float32)
        self.squared_C = self.squared_C + norm_C.double().square()
        self.tokens += x_NC.shape[0]

    def include(self, other: ChannelSums) -> None:
        """Add the sums of another one, over other tokens."""
        self.absolute_C = self.absolute_C + other.absolute_C
        self.squared_C = self.squared_C + other.squared_C
        self.tokens += other.tokens

    @property
    def mean_absolute_C(self) -> Tensor:
        """E[|x_c|]."""
        assert isinstance(self.absolute_C, Tensor) and self.tokens > 0
        return self.absolute_C / self.tokens

    @property
    def root_mean_square_C(self) -> Tensor:
        """sqrt(E[x_c^2])."""
        assert isinstance(self.squared_C, Tensor) and self.tokens > 0
        return (self.squared_C / self.tokens).sqrt()


@dataclass(kw_only=True)
class LayerMeasure:
    """The measures of one layer on the calibration tokens."""

    cosine_sum: float = 0.0
    tokens: int = 0
    channels: Mapping[Part, ChannelSums] = field(
        default_factory=lambda: {"attention": ChannelSums(), "mlp": ChannelSums()}
    )

    def add_stream(self, before: Tensor, after: Tensor, keep: Tensor | None) -> None:
        """Add a batch of hidden states before and after the layer, `[B, T, D]`."""
        cosine = cosines(before, after, keep)
        self.cosine_sum += float(cosine.sum(dtype=torch.float64))
        self.tokens += cosine.numel()

    def include(self, other: LayerMeasure) -> None:
        """Add the sums of another one, over other tokens."""
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
        UserError: there are some; `where` names the tensor.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"{where} has NaN or infinity.",
            "The model overflows in this dtype (try --dtype bfloat16 or float32), or its weights are damaged.",
        )


def last_real(ids: Tensor, mask: Tensor | None) -> Tensor:
    """True at the last real token of each sequence."""
    last = torch.zeros_like(ids, dtype=torch.bool)
    ends = torch.full((ids.shape[0],), ids.shape[1] - 1) if mask is None else mask.sum(dim=1) - 1
    last[torch.arange(ids.shape[0]), ends.to(ids.device)] = True
    return last


def writer_of(module: nn.Module, part: Part, architecture: Architecture) -> tuple[str, float] | None:
    """The output projection of a part of a layer, and the factor on its output before the residual sum.

    Without a family file: the last linear module known to write to the residual stream (`mlp`), and the one before it
    (`attention`); None if a layer has none.
    """
    if architecture.inspected is None:
        return architecture.writer(part).module, architecture.residual_scale
    names = {name for name, _ in module.named_modules()}
    own = [(name, scale) for name, scale in (architecture.inspected.writers or {}).items() if name in names]
    place = 1 if part == "mlp" else 2
    return own[-place] if len(own) >= place else None


@contextmanager
def output_projections(
    layer: nn.Module,
    architecture: Architecture,
    receive: Callable[[Part, Tensor], None],
    parts: Sequence[Part] = PARTS,
) -> Iterator[None]:
    """Within the context, every forward of `layer` passes the inputs of o_proj and down_proj to `receive`.

    The inputs are `[..., C]` with C the query-head channels (attention) or the MLP channels; for a mixture
    `[tokens, experts]`, the measure of each expert's output.
    """
    with ExitStack() as stack:
        for part in parts:
            mixture, writer = architecture.is_mixture(part), writer_of(layer, part, architecture)

            def hook(module: nn.Module, args: tuple[Any, ...], part: Part = part, mixture: bool = mixture) -> None:
                receive(part, added_by_experts(module, *args, experts=architecture.n_experts) if mixture else args[0])

            name = architecture.family.modules.experts if mixture else writer and writer[0]
            if name is not None:
                stack.callback(layer.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield


def added_by_experts(module: nn.Module, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, *, experts: int) -> Tensor:
    """Sum of absolute values of each expert's weighted output at each token, `[N, experts]`; 0 if it is not chosen.

    Args:
        module: runs the experts on tokens `x_ND`, given the K chosen experts of each token and their weights.
    """
    sizes = torch.zeros(x_ND.shape[0], experts, dtype=torch.float32, device=x_ND.device)
    for expert in index_NK.unique().tolist():
        rows, places = torch.where(index_NK == expert)
        # Bypass the hooks: this is not a forward of the layer.
        out = module.forward(x_ND[rows], index_NK[rows, places][:, None], weight_NK[rows, places][:, None])
        sizes[rows, expert] = out.abs().sum(dim=-1, dtype=torch.float32)
    return sizes
