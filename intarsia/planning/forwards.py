"""How many layer-forwards a plan takes, before it starts.

The unit is a layer-forward over the calibration set. How much of the model lies behind a change is not known before
it is chosen, so this is an upper bound: every change at the front.
"""

from __future__ import annotations

import math

from intarsia.anatomy.spec import Anatomy
from intarsia.healing.layer_fit import passes
from intarsia.healing.settings import ClosedFormSettings
from intarsia.planning.blocks import NEAREST
from intarsia.planning.laco import SEQUENCES
from intarsia.planning.settings import ComeSettings, LacoSettings, Settings, layers_at_once
from intarsia.planning.taylor import LAYERS_A_PASS


def plan_forwards(
    method: str,
    settings: Settings | None,
    anatomy: Anatomy,
    target: int,
    tokens: int,
    seq_len: int,
    in_loop: ClosedFormSettings | None,
) -> tuple[int, int]:
    """Steps, and layer-forwards at most."""
    depth = anatomy.n_layers
    width = layers_at_once(settings)
    forwards, steps, current = first_forwards(method, depth), 0, depth
    while current > target:
        count = min(width, current - target + 1)
        after = current - (count - 1)
        if isinstance(settings, ComeSettings):
            forwards += come_step(method, settings, current, count)
        elif isinstance(settings, LacoSettings):
            # Every layer may be tried, with all layers run, on a few sequences; once more, the original model is.
            tried = current * after + (depth if not steps else 0)
            forwards += math.ceil(tried * min(1.0, SEQUENCES / max(tokens // seq_len, 1))) + after
        elif method == "sleb":
            forwards += current * (current - 1) // 2 + after
        if in_loop is not None:
            # The layer that is put in, and the one before it, whose span may have grown. Held-out loss without the fit
            # decides whether it is taken; if it is not, the model is measured once more.
            fits = min(after, 1 if method == "sleb" else 2) * passes(anatomy, in_loop.changed)
            finalists = settings.finalists if isinstance(settings, ComeSettings) and method == "come-p" else 1
            if finalists == 1:
                forwards += fits + after + math.ceil(after / in_loop.held_out)
            else:
                # Held-out loss without and with the fit; where two layers are fitted, the model as it was is measured
                # anew behind the first.
                forwards += finalists * (fits + current + math.ceil(2 * after / in_loop.held_out))
            if isinstance(settings, ComeSettings) and method == "come-p" and settings.blocks:
                # Held-out loss of the nearest blocks, a fit and the loss with it of some; and all of the model is new.
                one = passes(anatomy, in_loop.changed) + math.ceil(after / in_loop.held_out)
                forwards += NEAREST * math.ceil(after / in_loop.held_out) + settings.blocks * one + after
        current, steps = after, steps + 1
    return steps, forwards


def first_forwards(method: str, depth: int) -> int:
    """Layer-forwards before the first decision."""
    if method in ("magnitude", "magnitude+", "reverse"):
        return 0
    return depth * (1 + LAYERS_A_PASS) if method in ("taylor", "taylor+") else depth


def come_step(method: str, settings: ComeSettings, current: int, count: int) -> int:
    """Layer-forwards of one step that makes `count` of `current` layers one."""
    after = current - (count - 1)
    forwards = after
    if settings.span_choice == "sleb":
        forwards += sum(current - start - count for start in range(current - count + 1))
    if method == "come-p":
        spans = min(settings.spans, after)
        forwards += spans * math.comb(settings.granularity + count - 1, count - 1) * after
        if settings.removals:  # count - 1 adjacent layers, wherever they are
            forwards += sum(after - start for start in range(after + 1))
    return forwards
