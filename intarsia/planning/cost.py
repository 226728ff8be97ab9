"""What a plan will cost, before it starts.

The unit is a layer-forward over the calibration set. How much of the model lies behind a change is not known before
it is chosen, so the cost is an upper bound: every change at the front. Memory is that of the part of the work that
needs most: a layer on a batch, a loss from logits, or a closed-form fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from intarsia.anatomy.spec import Anatomy
from intarsia.healing.closed_form_cost import closed_form_cost_at_most
from intarsia.healing.closed_form_settings import ClosedFormSettings
from intarsia.healing.layer_fit import passes
from intarsia.planning.blocks import NEAREST
from intarsia.planning.laco import SEQUENCES
from intarsia.planning.settings import RECONSTRUCTION_TOKENS, ComeSettings, LacoSettings, Settings, layers_at_once
from intarsia.planning.sizes import FITTED_LAYERS, JUDGED_TOKENS, STREAMED_LOGIT_BYTES, Held, Sizes
from intarsia.planning.taylor import LAYERS_A_PASS


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Predicted cost of a plan.

    `layer_forwards_at_most`: with every change at the front; `flops_at_most` of them. `heal_forwards_at_most`: for the
    closed form, where it is a part of the job. `hidden_bytes`: hidden states at every depth; `spilled_bytes` of them
    go to files, where memory is short. `peak_memory_bytes`: of the host, with Python and its libraries.
    `peak_device_bytes`: of the fullest device, where that has memory of its own.
    """

    steps: int
    layer_forwards_at_most: int
    heal_forwards_at_most: int | None = None
    flops_at_most: float
    weight_bytes: int
    hidden_bytes: int
    spilled_bytes: int
    peak_memory_bytes: int
    peak_device_bytes: int | None = None

    def words(self) -> str:
        """What is said before the work begins."""
        on_device = "" if self.peak_device_bytes is None else f", {_gb(self.peak_device_bytes)} on a device"
        spilled = f", {_gb(self.spilled_bytes)} of it in files" if self.spilled_bytes else ""
        return (
            f"predicted: at most {self.layer_forwards_at_most} layer-forwards; memory {_gb(self.peak_memory_bytes)}"
            f"{on_device}; hidden states {_gb(self.hidden_bytes)}{spilled}"
        )


def predict(
    sizes: Sizes,
    method: str,
    settings: Settings | None,
    *,
    target: int,
    tokens: int,
    seq_len: int,
    held: Held,
    in_loop: ClosedFormSettings | None = None,
) -> Cost:
    """Cost and peak memory of planning from the model's depth down to `target`.

    Args:
        held: how the model is held.
        in_loop: how what a step changes is repaired before the next, if it is.
    """
    depth = sizes.anatomy.n_layers
    steps, forwards = _forwards(method, settings, sizes.anatomy, target, tokens, seq_len, in_loop)
    # Taylor keeps the gradient at one depth besides the hidden states; what measures nothing keeps none of them.
    kept_depths = 0 if not _once(method, depth) else depth + (2 if method.startswith("taylor") else 1)
    judged = tokens if in_loop is not None else _reconstructed(settings, tokens)
    hidden = sizes.hidden(kept_depths * tokens + depth * judged)  # the original's, beside the model's own
    cost = Cost(
        steps=steps,
        layer_forwards_at_most=forwards,
        flops_at_most=forwards * sizes.flops(tokens, seq_len),
        weight_bytes=sizes.weight_bytes,
        hidden_bytes=hidden,
        spilled_bytes=max(0, hidden - held.memory_bytes),
        peak_memory_bytes=0,
    )
    made = depth - target + 1
    batch = sizes.batch(min(held.batch_tokens, tokens))
    logits = sizes.logits(min(held.batch_tokens, tokens), seq_len)
    parts = [
        held.weights(sizes, made=made, outside=False) + batch,
        held.weights(sizes, made=made, layers=0) + logits + _left(batch, held),
    ]
    if judged:
        fit = sizes.fit(judged, (in_loop or ClosedFormSettings()).held_out, stream=held.stream)
        parts.append(held.weights(sizes, made=made, layers=FITTED_LAYERS, outside=False) + fit + batch)
    recipe = sizes.fitted(depth - target, attention=depth - target) if in_loop is not None else 0
    return _with_peak(cost, sizes, held, max(parts), hidden=hidden, recipe=recipe)


def with_closed_form(
    cost: Cost, sizes: Sizes, settings: ClosedFormSettings, *, target: int, tokens: int, held: Held, starts: int = 1
) -> Cost:
    """The same with a closed-form repair of the `target` layers on the same tokens, and with what judges it.

    Args:
        starts: so many fits are made, one after the other, and the best is kept.
    """
    depth = sizes.anatomy.n_layers
    forwards = starts * closed_form_cost_at_most(depth, target, settings, sizes.anatomy)
    fitted, changed = _fitted_at_most(sizes, settings, target)
    hidden = sizes.hidden((2 + fitted) * tokens)
    cost = replace(
        cost,
        heal_forwards_at_most=forwards + math.ceil((1 + starts) * target / settings.held_out),
        hidden_bytes=max(cost.hidden_bytes, hidden),
        spilled_bytes=max(cost.spilled_bytes, hidden - held.memory_bytes),
    )
    batch = sizes.batch(min(held.batch_tokens, tokens))
    fit = sizes.fit(tokens, settings.held_out, stream=held.stream)
    fitting = held.weights(sizes, made=changed, layers=FITTED_LAYERS, outside=False) + fit + batch
    kept = sizes.fitted(fitted, attention=_attention_at_most(settings, fitted, changed))
    recipe = min(starts, 2) * kept  # the best one's so far, and what is fitted
    cost = _with_peak(cost, sizes, held, fitting, hidden=hidden, recipe=recipe)
    # Then the fitted layers are made, and judged by held-out tokens.
    judged = held.weights(sizes, made=fitted + changed, layers=0) + _judged(sizes, held, tokens // settings.held_out)
    return _with_peak(cost, sizes, held, judged, hidden=sizes.hidden(tokens) if held.stream else 0, recipe=recipe)


def with_judging(
    cost: Cost, sizes: Sizes, *, target: int, tokens: int, held: Held, healed: ClosedFormSettings | None = None
) -> Cost:
    """The same with the two models that are compared at the end on so many tokens: both in memory, unless they are
    streamed, and what was fitted, which stays with the recipe."""
    fitted, changed = (0, 0) if healed is None else _fitted_at_most(sizes, healed, target)
    small = 0 if held.stream else sizes.outside_bytes + target * sizes.layer_bytes
    judging = held.weights(sizes, layers=0) + small + _judged(sizes, held, tokens)
    building = held.weights(sizes, layers=1.0) if held.stream else 0
    hidden = sizes.hidden(tokens) if held.stream else 0
    attention = 0 if healed is None else _attention_at_most(healed, fitted, changed)
    recipe = sizes.fitted(fitted, attention=attention)
    return _with_peak(cost, sizes, held, max(judging, building), hidden=hidden, recipe=recipe)


def _fitted_at_most(sizes: Sizes, settings: ClosedFormSettings, target: int) -> tuple[int, int]:
    """Layers that the closed form fits, and those of them that stand for more than themselves: at most."""
    changed = min(target, sizes.anatomy.n_layers - target)
    return (target if settings.layers == "behind" else changed), changed


def _attention_at_most(settings: ClosedFormSettings, fitted: int, changed: int) -> int:
    """Layers of which o_proj is fitted, of so many that are fitted and changed."""
    return fitted if "attention" in settings.unchanged else changed


def _judged(sizes: Sizes, held: Held, tokens: int) -> int:
    """What a perplexity on so many tokens takes beside weights."""
    tokens = min(tokens, JUDGED_TOKENS)
    logits = tokens * sizes.anatomy.vocabulary * sizes.itemsize
    # In memory the whole model makes all logits at once.
    return min(logits, STREAMED_LOGIT_BYTES) if held.stream else logits + sizes.batch(tokens)


def _left(batch: int, held: Held) -> int:
    """What a batch leaves behind: freed pieces, which go back to the system where layers come and go."""
    return 0 if held.stream else batch


def _with_peak(cost: Cost, sizes: Sizes, held: Held, part: int, *, hidden: int, recipe: int = 0) -> Cost:
    """With the peak of a further part of the work, where it is higher: the weights in it and what is made of them."""
    kept = min(hidden, held.memory_bytes) + (0 if held.stream else recipe)  # of a streamed model it goes into files
    on_its_way = sizes.layer_bytes if held.stream else 0  # to a device, from memory that does not page
    host = sizes.base_bytes + kept + (on_its_way if held.apart else part)
    device = part if held.apart else None
    before = cost.peak_device_bytes
    return replace(
        cost,
        peak_memory_bytes=max(cost.peak_memory_bytes, host),
        peak_device_bytes=device if before is None or device is None else max(before, device),
    )


def _forwards(
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
    forwards, steps, current = _once(method, depth), 0, depth
    while current > target:
        count = min(width, current - target + 1)
        after = current - (count - 1)
        if isinstance(settings, ComeSettings):
            # The first step has one model before it; behind every step each of the beam is measured.
            forwards += _come_step(method, settings, current, count, tokens) * (settings.beam if steps else 1)
            forwards += (settings.beam - 1) * after
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


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _once(method: str, depth: int) -> int:
    """Layer-forwards before the first decision."""
    if method in ("magnitude", "magnitude+", "reverse"):
        return 0
    return depth * (1 + LAYERS_A_PASS) if method in ("taylor", "taylor+") else depth


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
        if settings.removals:  # count - 1 adjacent layers, wherever they are
            forwards += sum(after - start for start in range(after + 1))
    return forwards
