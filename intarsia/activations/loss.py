"""The loss of the next token, and the divergence from another model's distribution of it, sequence by sequence.

Shapes: B sequences, T tokens, V vocabulary, D width, N predicted positions, K likeliest tokens.

Logits over a large vocabulary are the largest tensor of a forward pass. Their float32 copy is never made: a few
rows at a time are converted and normalised, on the CPU few enough to stay in cache. With bfloat16 logits of 4096
tokens over a vocabulary of 49,152 that is about ten times as fast on one core as `F.cross_entropy` on a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from intarsia.activations.batches import side_by_side, workers_for
from intarsia.errors import UserError

_CPU_BLOCK = 8 * 49152  # float32 entries of one block: 1.5 MB, inside a core's cache
_GPU_BLOCK = 64 * 1024 * 1024  # large enough to fill the device, small against the logits themselves
_HEAD_ROWS = 512  # positions that go through the head at once: efficient as a product, small as a tensor


_LEAST_REST = 1e-6
TOP = 64
_CPU_ROWS = 32
_GPU_ROWS = 2048

OfRows: TypeAlias = Callable[[Tensor, slice], Tensor]
"""From log-probabilities `[n, V]` of some predicted positions, and which these are, to a number for each."""


class Likeliest(NamedTuple):
    """The K likeliest next tokens at every position, `[B, T, K]` or `[N, K]`: log-probabilities, and which they are."""

    log_p: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, k: int = TOP, temperature: float = 1.0) -> Likeliest:
        """By a model's logits at some positions."""
        parts = []
        for block_NV in logits_NV.split(_rows(logits_NV)):
            found = _log_p(block_NV, temperature).topk(min(k, block_NV.shape[-1]), dim=-1)
            parts.append((found.values, found.indices.to(torch.int32)))
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def divergence(self, logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
        """KL of another model's next token, by its logits at these positions `[N]`; see the function."""
        found, step = [], _rows(logits_NV)
        log_p_NK, index_NK = (each.to(logits_NV.device) for each in self)
        for start in range(0, len(logits_NV), step):
            part = slice(start, start + step)
            log_s = _log_p(logits_NV[part], temperature).gather(1, index_NK[part].long())
            found.append(divergence(log_p_NK[part].float(), log_s))
        return torch.cat(found)

    def rows(self, rows: slice) -> Likeliest:
        """Those of some sequences, or positions."""
        return Likeliest(self.log_p[rows], self.tokens[rows])


def _log_p(logits_NV: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.float()
    return torch.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, dim=-1)


def _rows(logits_NV: Tensor) -> int:
    return _CPU_ROWS if logits_NV.device.type == "cpu" else _GPU_ROWS


def next_token_losses(
    logits_BTV: Tensor,
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    expected: Likeliest | None = None,
    where: str = "next-token loss",
) -> tuple[Tensor, Tensor]:
    """Summed loss (nats) and number of predicted tokens of every sequence.

    Position t predicts token t + 1, so the first token is never predicted. A prediction counts when both tokens are
    real; padding counts nowhere, and logits at padding are not looked at.

    Args:
        logits_BTV: the model's logits, any float dtype.
        ids_BT: the tokens that the model was given.
        mask_BT: True at real tokens; None when all are.
        expected: measure KL(another model || this one) instead, of which these are the likeliest tokens.
        where: what is measured, for the message when a loss is not finite.

    Returns:
        `sums_B` (float64) and `counts_B` (int64), on the logits' device.
    """
    rows_N, cols_N, targets_N = _predicted(ids_BT, mask_BT, logits_BTV.device)
    if expected is None:

        def of_rows(log_p_NV: Tensor, part: slice) -> Tensor:
            return -log_p_NV.gather(1, targets_N[part, None])[:, 0]
    else:
        log_t_NK = expected.log_p.to(logits_BTV.device)[rows_N, cols_N].float()
        index_NK = expected.tokens.to(logits_BTV.device)[rows_N, cols_N].long()

        def of_rows(log_p_NV: Tensor, part: slice) -> Tensor:
            return divergence(log_t_NK[part], log_p_NV.gather(1, index_NK[part]))

    dense = rows_N.numel() == ids_BT.shape[0] * max(ids_BT.shape[1] - 1, 0)
    losses_N = torch.empty(rows_N.numel(), dtype=torch.float32, device=logits_BTV.device)
    with torch.no_grad():
        if dense:  # views: nothing is copied before a block is converted
            width, rows = ids_BT.shape[1] - 1, range(ids_BT.shape[0])

            def sequence(b: int) -> None:
                _block_losses(logits_BTV[b, :-1], of_rows, b * width, losses_N)

            for _ in side_by_side(rows, sequence, workers_for(logits_BTV.device, len(rows))):
                pass
        else:
            for start in range(0, rows_N.numel(), _HEAD_ROWS):
                part = slice(start, start + _HEAD_ROWS)
                _block_losses(logits_BTV[rows_N[part], cols_N[part]], of_rows, start, losses_N)
    return _by_sequence(losses_N, rows_N, ids_BT.shape[0], where)


def _predicted(ids_BT: Tensor, mask_BT: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence and position of every prediction, and the token that is right there; in row order."""
    counts_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    rows_N, cols_N = (counts_BT[:, :-1] & counts_BT[:, 1:]).nonzero(as_tuple=True)
    targets_N = ids_BT[rows_N, cols_N + 1]
    return rows_N.to(device), cols_N.to(device), targets_N.to(device)


def _block_losses(logits_NV: Tensor, of_rows: OfRows, first: int, out_N: Tensor) -> None:
    """Losses of consecutive predicted positions from `first` on."""
    budget = _CPU_BLOCK if logits_NV.device.type == "cpu" else _GPU_BLOCK
    rows = max(1, budget // logits_NV.shape[1])
    for start in range(0, logits_NV.shape[0], rows):
        log_p_NV = torch.log_softmax(logits_NV[start : start + rows], dim=-1, dtype=torch.float32)
        part = slice(first + start, first + start + log_p_NV.shape[0])
        out_N[part] = of_rows(log_p_NV, part)


def divergence(log_t_NK: Tensor, log_s_NK: Tensor) -> Tensor:
    """KL(teacher || student) over the teacher's K likeliest tokens and one bucket for the rest, in nats: `[N]`.

    A lower bound of the KL over the whole vocabulary.
    """
    kept = (log_t_NK.exp() * (log_t_NK - log_s_NK)).sum(dim=-1)
    rest_t = (1.0 - log_t_NK.exp().sum(dim=-1)).clamp_min(_LEAST_REST)
    rest_s = (1.0 - log_s_NK.exp().sum(dim=-1)).clamp_min(_LEAST_REST)
    return kept + rest_t * (rest_t.log() - rest_s.log())


def _by_sequence(losses_N: Tensor, rows_N: Tensor, n_sequences: int, where: str) -> tuple[Tensor, Tensor]:
    bad_N = ~losses_N.isfinite()
    if bool(bad_N.any()):
        first = int(rows_N[bad_N][0])
        raise UserError(
            f"{where}, sequence {first} of the batch: expected finite losses; "
            f"found {int(bad_N.sum())} of {losses_N.numel()} losses that are NaN or infinite.",
            "Check the model's weights, and use bfloat16 or float32 if it was run in float16.",
        )
    # Accumulated on the CPU: index_add in float64 is not deterministic on CUDA and does not exist on MPS.
    rows_cpu_N = rows_N.cpu()
    sums_B = torch.zeros(n_sequences, dtype=torch.float64).index_add_(0, rows_cpu_N, losses_N.cpu().double())
    counts_B = torch.bincount(rows_cpu_N, minlength=n_sequences)
    if losses_N.device.type == "mps":
        return sums_B, counts_B
    return sums_B.to(losses_N.device), counts_B.to(losses_N.device)
