"""What a plan will cost, before it starts.

Layer-forwards are counted in `intarsia.planning.forwards`. Memory is that of the part of the work that needs most: a
layer on a batch, a loss from logits, or a closed-form fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from intarsia.healing.closed_form_cost import closed_form_cost_at_most
from intarsia.healing.settings import ClosedFormSettings
from intarsia.planning.forwards import first_forwards, plan_forwards
from intarsia.planning.settings import Settings
from intarsia.planning.sizes import FITTED_LAYERS, JUDGED_TOKENS, STREAMED_LOGIT_BYTES, Held, Sizes


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
    writes: bool = False,
) -> Cost:
    """Cost and peak memory of planning from the model's depth down to `target`.

    Args:
        held: how the model is held.
        in_loop: how what a step changes is repaired before the next, if it is.
        writes: the model writes the text itself.
    """
    depth = sizes.anatomy.n_layers
    steps, forwards = plan_forwards(method, settings, sizes.anatomy, target, tokens, seq_len, in_loop)
    # Taylor keeps the gradient at one depth besides the hidden states; what measures nothing keeps none of them.
    kept_depths = 0 if not first_forwards(method, depth) else depth + (2 if method.startswith("taylor") else 1)
    judged = tokens if in_loop is not None else 0
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
    cost = _with_peak(cost, sizes, held, max(parts), hidden=hidden, recipe=recipe)
    if not writes or held.stream:  # a streamed model writes nothing: its text is there
        return cost
    return _with_peak(cost, sizes, held, held.weights(sizes) + sizes.writing(tokens, seq_len), hidden=0)


def with_closed_form(
    cost: Cost,
    sizes: Sizes,
    settings: ClosedFormSettings,
    *,
    target: int,
    tokens: int,
    held: Held,
    starts: int = 1,
    judged: int | None = None,
) -> Cost:
    """The same with a closed-form repair of the `target` layers on the same tokens, and with what judges it.

    Args:
        starts: so many fits are made, one after the other, and the best is kept.
        judged: on so many tokens every end, and the model as it was cut, is judged; the held-out sequences by default.
    """
    judged = tokens // settings.held_out if judged is None else judged
    depth = sizes.anatomy.n_layers
    forwards = starts * closed_form_cost_at_most(depth, target, settings, sizes.anatomy)
    fitted, changed = _fitted_at_most(sizes, settings, target)
    # Several fits share the original's states at every depth, where there is room for them.
    shared = sizes.hidden((depth + 1) * tokens) if starts > 1 else 0
    own = sizes.hidden((2 + fitted) * tokens)
    hidden = max(own, shared + sizes.hidden(tokens)) if shared <= held.memory_bytes else own
    cost = replace(
        cost,
        heal_forwards_at_most=forwards + math.ceil((1 + starts) * target * judged / tokens),
        hidden_bytes=max(cost.hidden_bytes, hidden),
        spilled_bytes=max(cost.spilled_bytes, hidden - held.memory_bytes),
    )
    batch = sizes.batch(min(held.batch_tokens, tokens))
    fit = sizes.fit(tokens, settings.held_out, stream=held.stream)
    fitting = held.weights(sizes, made=changed, layers=FITTED_LAYERS, outside=False) + fit + batch
    kept = sizes.fitted(fitted, attention=_attention_at_most(settings, fitted, changed))
    recipe = min(starts, 2) * kept  # the best one's so far, and what is fitted
    cost = _with_peak(cost, sizes, held, fitting, hidden=hidden, recipe=recipe)
    # Then the fitted layers are made, and judged.
    judging = held.weights(sizes, made=fitted + changed, layers=0) + _judged(sizes, held, judged)
    return _with_peak(cost, sizes, held, judging, hidden=sizes.hidden(tokens) if held.stream else 0, recipe=recipe)


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


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
