"""What is measured on one layer of the model in the middle of pruning, and between two depths of it.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from intarsia.architecture.spec import Part
from intarsia.calibration.stats import LayerMeasure, cosines, last_real, require_finite
from intarsia.calibration.taps import read_outs
from intarsia.planning.scores import angular_distance

if TYPE_CHECKING:
    from intarsia.planning.measured import Measured


def measure_layer(model: Measured, index: int, module: nn.Module, advance: Callable[[], None]) -> LayerMeasure:
    """Run a layer (awake) from the hidden states before it; those behind it are kept."""
    measure = LayerMeasure()
    source = model.ops[index].sources[0].layer

    def work(part: slice, ids: Tensor, mask: Tensor | None) -> None:
        before = model.hidden_at(index, part)
        inputs: list[tuple[Part, Tensor]] = []
        with read_outs(module, model.architecture, lambda where, x: inputs.append((where, x))):
            behind = model.stream.run(module, before, model.stream.calls(ids, mask)[source])
        require_finite(behind, f"output of layer {index}")
        normed = behind
        if model.behind_final_norm and index + 1 == model.depth:
            normed = model.stream.final_norm(behind, ids, mask)
        found = LayerMeasure()
        found.add_stream(before, normed.to(before.device), mask)
        for where, x in inputs:
            found.channels[where].add(x, None if mask is None else mask.to(x.device))
        model.hidden.put(index + 1, part.start, behind)
        measure.include(found)
        model.spend(1, part)
        advance()

    model.batches.each(work)
    return measure


def measure_new_last(model: Measured) -> LayerMeasure:
    """The influence of a layer that has become the last one: its output now counts behind the final norm."""
    fresh = LayerMeasure(channels=model.measures[-1].channels)
    for part, ids, mask in model.batches.over():
        behind = output(model, model.depth, part, ids, mask)
        fresh.add_stream(model.hidden_at(model.depth - 1, part), behind, mask)
    return fresh


def measure_loss(model: Measured, advance: Callable[[], None]) -> None:
    """The loss of every sequence, from the hidden states behind the last layer."""

    def work(part: slice, ids: Tensor, mask: Tensor | None) -> None:
        model.losses_N[part], model.counts_N[part] = model.stream.losses(model.hidden_at(model.depth, part), ids, mask)
        advance()

    model.batches.each(work)


def distance(model: Measured, start: int, count: int, tokens: Literal["all-tokens", "last-token"]) -> float:
    """E[arccos(cos(H^start, H^{start+count}))] / pi."""
    total, number = 0.0, 0
    for part, ids, mask in model.batches.over():
        before = model.hidden_at(start, part)
        behind = output(model, start + count, part, ids, mask)
        keep = last_real(ids, mask) if tokens == "last-token" else mask
        found = angular_distance(cosines(before, behind, keep))
        total, number = total + float(found.sum()), number + found.numel()
    return total / number


def output(model: Measured, depth: int, part: slice, ids: Tensor, mask: Tensor | None) -> Tensor:
    """H^depth of some sequences; of the last layer behind the final norm, where that is wanted."""
    h_BTD = model.hidden_at(depth, part)
    if model.behind_final_norm and depth == model.depth:
        return model.stream.final_norm(h_BTD, ids, mask)
    return h_BTD
