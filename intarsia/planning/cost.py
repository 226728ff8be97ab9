"""What a plan will cost, before it starts.

The unit is a layer-forward over the calibration set. How much of the model lies behind a change is not known before
it is chosen, so the cost is an upper bound: every change at the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

from intarsia.checkpoint.reader import Checkpoint
from intarsia.planning.settings import ComeSettings

_LOGIT_COPIES = 2
_ACTIVATION_COPIES = 6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Predicted cost of a plan.

    `layer_forwards_at_most`: with every change at the front. `hidden_bytes`: hidden states at every depth, which
    spill to disk where memory is short. `peak_memory_bytes`: weights, hidden states, logits and activations of a
    batch, and one merged layer a step.
    """

    steps: int
    layer_forwards_at_most: int
    weight_bytes: int
    hidden_bytes: int
    peak_memory_bytes: int


def predict(
    checkpoint: Checkpoint,
    method: str,
    settings: ComeSettings,
    *,
    target: int,
    tokens: int,
    seq_len: int,
    dtype: torch.dtype | None,
    memory_bytes: int | None,
) -> Cost:
    """Cost and peak memory of planning from the model's depth down to `target`."""
    anatomy = checkpoint.anatomy
    depth = anatomy.n_layers
    width = settings.merge if method.startswith("come") else 2
    forwards, steps, current = depth, 0, depth
    while current > target:
        count = min(width, current - target + 1)
        after = current - (count - 1)
        if method == "sleb":
            forwards += current * (current - 1) // 2 + after
        elif method != "shortgpt":
            if settings.span_choice == "sleb":
                forwards += sum(current - start - count for start in range(current - count + 1))
            if method == "come-p":
                forwards += comb(settings.granularity + count - 1, count - 1) * after
            forwards += after
        current, steps = after, steps + 1
    itemsize = (dtype or checkpoint.headers[f"{anatomy.family.embedding_module}.weight"].dtype).itemsize
    stored = checkpoint.headers[f"{anatomy.family.embedding_module}.weight"].dtype.itemsize
    weights = checkpoint.nbytes * itemsize // stored
    hidden = (depth + 1) * tokens * anatomy.width * itemsize
    logits = _LOGIT_COPIES * seq_len * anatomy.vocabulary * itemsize
    activations = _ACTIVATION_COPIES * 2048 * max(anatomy.n_channels, anatomy.width) * 4
    merged = (depth - target) * anatomy.layer_parameters * itemsize
    kept = hidden if memory_bytes is None else min(hidden, memory_bytes)
    return Cost(
        steps=steps,
        layer_forwards_at_most=forwards,
        weight_bytes=weights,
        hidden_bytes=hidden,
        peak_memory_bytes=weights + kept + logits + activations + merged,
    )
