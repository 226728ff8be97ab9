"""What a plan will cost, before it starts.

The unit is a layer-forward over the calibration set. How much of the model lies behind a change is not known before
it is chosen, so the cost is an upper bound: every change at the front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from intarsia.anatomy.spec import PARTS, Anatomy
from intarsia.checkpoint.reader import Checkpoint
from intarsia.healing.closed_form import ClosedFormSettings, closed_form_cost_at_most
from intarsia.planning.laco import SEQUENCES
from intarsia.planning.settings import RECONSTRUCTION_TOKENS, ComeSettings, LacoSettings, Settings, layers_at_once
from intarsia.planning.taylor import LAYERS_A_PASS

_LOGIT_COPIES = 2
_ACTIVATION_COPIES = 6
_GRAM_COPIES = 5  # fitted and held-out moments, the system, its factor, the unit matrix


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Predicted cost of a plan.

    `layer_forwards_at_most`: with every change at the front. `hidden_bytes`: hidden states at every depth, which
    spill to disk where memory is short. `peak_memory_bytes`: weights, hidden states, logits and activations of a
    batch, and one merged layer a step. `heal_forwards_at_most`: for the closed form, where it is a part of the job.
    """

    steps: int
    layer_forwards_at_most: int
    heal_forwards_at_most: int | None = None
    weight_bytes: int
    hidden_bytes: int
    peak_memory_bytes: int


def predict(
    checkpoint: Checkpoint,
    method: str,
    settings: Settings | None,
    *,
    target: int,
    tokens: int,
    seq_len: int,
    dtype: torch.dtype | None,
    memory_bytes: int | None,
    in_loop: ClosedFormSettings | None = None,
) -> Cost:
    """Cost and peak memory of planning from the model's depth down to `target`.

    Args:
        in_loop: how what a step changes is repaired before the next, if it is.
    """
    anatomy = checkpoint.anatomy
    depth = anatomy.n_layers
    width = layers_at_once(settings)
    forwards, steps, current = _once(method, depth), 0, depth
    while current > target:
        count = min(width, current - target + 1)
        after = current - (count - 1)
        if isinstance(settings, ComeSettings):
            forwards += _come_step(method, settings, current, count, tokens)
        elif isinstance(settings, LacoSettings):
            # Every layer may be tried, with all layers run, on a few sequences; once more, the original model is.
            tried = current * after + (depth if not steps else 0)
            forwards += math.ceil(tried * min(1.0, SEQUENCES / max(tokens // seq_len, 1))) + after
        elif method == "sleb":
            forwards += current * (current - 1) // 2 + after
        if in_loop is not None:
            # The layer that is put in, and the one before it, whose span may have grown. Held-out loss without the fit
            # decides whether it is taken; if it is not, the model is measured once more.
            forwards += min(after, 1 if method == "sleb" else 2) * len(in_loop.changed)
            forwards += after + math.ceil(after / in_loop.held_out)
        current, steps = after, steps + 1
    itemsize = (dtype or checkpoint.headers[f"{anatomy.family.embedding_module}.weight"].dtype).itemsize
    stored = checkpoint.headers[f"{anatomy.family.embedding_module}.weight"].dtype.itemsize
    weights = checkpoint.nbytes * itemsize // stored
    # Taylor keeps the gradient at one depth besides the hidden states; what measures nothing keeps none of them.
    kept_depths = 0 if not _once(method, depth) else depth + (2 if method.startswith("taylor") else 1)
    hidden = kept_depths * tokens * anatomy.width * itemsize
    judged = tokens if in_loop is not None else _reconstructed(settings, tokens)
    hidden += depth * judged * anatomy.width * itemsize  # the original's, beside the model's own
    logits = _LOGIT_COPIES * seq_len * anatomy.vocabulary * itemsize
    activations = _ACTIVATION_COPIES * 2048 * max(anatomy.n_channels, anatomy.width) * 4
    merged = (depth - target) * anatomy.layer_parameters * itemsize
    kept = hidden if memory_bytes is None else min(hidden, memory_bytes)
    return Cost(
        steps=steps,
        layer_forwards_at_most=forwards,
        weight_bytes=weights,
        hidden_bytes=hidden,
        peak_memory_bytes=weights + kept + logits + activations + merged + (_grams(anatomy) if judged else 0),
    )


def with_closed_form(
    cost: Cost,
    checkpoint: Checkpoint,
    settings: ClosedFormSettings,
    *,
    target: int,
    tokens: int,
    dtype: torch.dtype | None,
) -> Cost:
    """The same with a closed-form repair of the `target` layers on the same tokens, and with what judges it."""
    anatomy = checkpoint.anatomy
    depth = anatomy.n_layers
    forwards = closed_form_cost_at_most(depth, target, settings)
    itemsize = (dtype or checkpoint.headers[f"{anatomy.family.embedding_module}.weight"].dtype).itemsize
    fitted = target if settings.layers == "behind" else min(target, depth - target)
    hidden = (1 + fitted) * tokens * anatomy.width * itemsize
    return replace(
        cost,
        heal_forwards_at_most=forwards + math.ceil(2 * target / settings.held_out),
        hidden_bytes=max(cost.hidden_bytes, hidden),
        peak_memory_bytes=max(cost.peak_memory_bytes, cost.weight_bytes + hidden + _grams(anatomy)),
    )


def _once(method: str, depth: int) -> int:
    """Layer-forwards before the first decision."""
    if method in ("magnitude", "magnitude+", "reverse"):
        return 0
    return depth * (1 + LAYERS_A_PASS) if method in ("taylor", "taylor+") else depth


def _grams(anatomy: Anatomy) -> int:
    """Bytes of a closed-form fit's moments."""
    features = max(anatomy.cut_size(anatomy.writer(part)) for part in PARTS)
    return 8 * (_GRAM_COPIES * features * features + 2 * features * anatomy.width)


def _reconstructed(settings: Settings | None, tokens: int) -> int:
    """Tokens on which spans are judged by their reconstruction."""
    chosen = isinstance(settings, ComeSettings) and settings.span_choice == "reconstruction"
    return min(tokens, RECONSTRUCTION_TOKENS) if chosen else 0


def _come_step(method: str, settings: ComeSettings, current: int, count: int, tokens: int) -> int:
    """Layer-forwards of one step that makes `count` of `current` layers one."""
    after = current - (count - 1)
    forwards = after
    if settings.span_choice == "sleb":
        forwards += sum(current - start - count for start in range(current - count + 1))
    # A layer-forward for each span, on part of the tokens.
    forwards += math.ceil(after * _reconstructed(settings, tokens) / max(tokens, 1))
    if method == "come-p":
        spans = min(settings.spans, after)
        forwards += spans * math.comb(settings.granularity + count - 1, count - 1) * after
    return forwards
