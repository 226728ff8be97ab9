"""Magnitude and Taylor, and their plus variants: drop the layers whose weights are smallest, or whose removal changes
the loss least, to first order.

Source: Kim et al., Shortened LLaMA, arXiv 2402.02834: the score of a layer is sum_k sum_ij |W^k_ij|, or
sum_k sum_ij |dL/dW^k_ij * W^k_ij| with L the mean next-token loss of the calibration set, over its linear weights W^k.
The plus variants never drop the first four and the last two layers.

Deviation: norm weights do not count, as in the paper (its code adds them; they are some thousandths of the sum). The
gradient is taken layer by layer: the calibration pass left the hidden states before each layer, so one layer at a time
runs again with gradients, and memory holds only its weights' gradients and one gradient of the residual stream.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.progress import current
from intarsia.pruning.step import OneShot
from intarsia.registry import planner

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.activations.hidden_store import HiddenStore
    from intarsia.activations.loop import Passed
    from intarsia.pruning.intermediate import Intermediate


PROTECTED = (4, 2)
"""First and last layers that the plus variants of the paper never drop."""


@planner("magnitude", paper="2402.02834")
class Magnitude(OneShot):
    """Drop the layers whose weights are smallest."""

    passes = 0

    def score(self, model: Intermediate) -> list[float]:
        """The sum of absolute linear weights of each layer."""
        import torch

        return [
            sum(
                float(weight.detach().abs().sum(dim=1, dtype=torch.float32).double().sum())
                for weight in linear_weights(model, index)
            )
            for index, _ in enumerate(model.resident.walk(model.modules))
        ]


@planner("magnitude+", paper="2402.02834")
class MagnitudePlus(Magnitude):
    """Drop the layers whose weights are smallest, of those between the first four and the last two."""

    protect = PROTECTED


def linear_weights(model: Intermediate, index: int) -> list[Tensor]:
    """The weights of a layer's linear modules (awake), in the architecture's order; those of experts together."""
    from intarsia.building.layer import parameter_name

    architecture = model.architecture
    if architecture.removal_only:
        return [each for each in model.modules[index].parameters() if each.dim() > 1 and each.is_floating_point()]
    names = [f"{architecture.modules(linear)[0]}.weight" for linear in architecture.linears]
    parameters = dict.fromkeys(parameter_name(name, architecture) for name in names)
    return [model.modules[index].get_parameter(name) for name in parameters]


LAYERS_A_PASS = 3
"""Layer-forwards of one layer with gradients: the forward, and about twice that for the backward."""


@planner("taylor", paper="2402.02834")
class Taylor(OneShot):
    """Drop the layers whose removal changes the loss least, to first order."""

    passes = 1 + LAYERS_A_PASS

    def score(self, model: Intermediate) -> list[float]:
        """The sum of absolute first-order changes of the loss over each layer's weights."""
        return saliences(model)


@planner("taylor+", paper="2402.02834")
class TaylorPlus(Taylor):
    """Drop the layers whose removal changes the loss least, of those between the first four and the last two."""

    protect = PROTECTED


def saliences(model: Intermediate) -> list[float]:
    """The scores of `Taylor`. `model` is the whole model, measured."""
    import torch

    predictions = int(model.counts_N.sum())
    grads = model.loop.store()
    scores = [0.0] * model.depth
    try:
        with torch.enable_grad(), current().task("gradients", model.depth + 1) as task:
            gradients_after_the_last(model, grads)
            task.advance()
            backwards = list(reversed(range(model.depth)))
            for index, _ in zip(backwards, model.resident.walk(model.modules[i] for i in backwards), strict=True):
                task.note(f"layer {index + 1} of {model.depth}")
                scores[index] = _through(model, grads, index) / predictions
                task.advance()
    finally:
        grads.close()
    return scores


def gradients_after_the_last(model: Intermediate, grads: HiddenStore) -> None:
    """Store the gradient of the summed loss by H^L in `grads`, one sequence at a time: logits are large."""
    import torch

    from intarsia.activations.statistics import require_finite

    for part, ids_BT, mask_BT in model.batches.over():
        h_BTD = model.hidden_at(model.depth, part)
        for row in range(ids_BT.shape[0]):
            rows = slice(row, row + 1)
            mask = None if mask_BT is None else mask_BT[rows]
            h_1TD = h_BTD[rows].clone().requires_grad_()
            loss = _summed_loss(
                model.loop.stream.logits(h_1TD, ids_BT[rows], mask)[0], ids_BT[row], None if mask is None else mask[0]
            )
            (grad,) = torch.autograd.grad(loss, h_1TD)
            require_finite(grad, "gradient after the last layer")
            grads.put(0, part.start + row, grad)


def _summed_loss(logits_TV: Tensor, ids_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Summed next-token loss of one sequence, over pairs of real tokens."""
    from torch.nn.functional import cross_entropy

    targets_T = ids_T[1:] if mask_T is None else ids_T[1:].masked_fill(~(mask_T[:-1] & mask_T[1:]), -100)
    return cross_entropy(logits_TV[:-1].float(), targets_T, reduction="sum", ignore_index=-100)


def _through(model: Intermediate, grads: HiddenStore, index: int) -> float:
    """Replace the gradient after a layer in `grads` by that before it.

    Returns:
        Sum of |gradient * weight| over the layer's linear weights, for the summed loss.
    """
    import torch

    from intarsia.activations.statistics import require_finite

    weights = linear_weights(model, index)
    totals = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]

    def read(rows: slice) -> Tensor:
        return model.hidden_at(index, rows).clone().requires_grad_()

    def then(passed: Passed) -> None:
        after_BTD = grads.get(0, passed.rows.start, passed.rows.stop, passed.before.device)
        before_BTD, *found = torch.autograd.grad(passed.after, [passed.before, *weights], after_BTD)
        require_finite(before_BTD, f"gradient before layer {index}")
        grads.put(0, passed.rows.start, before_BTD)
        for total, gradient in zip(totals, found, strict=True):
            total += gradient
        model.loop.spend(LAYERS_A_PASS - 1, passed.rows)

    for weight in weights:
        weight.requires_grad_(True)
    try:
        model.loop.layer(model.placed(index)[0], read, then)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return sum(
        float((total * weight.detach()).abs().sum(dim=1).sum(dtype=torch.float64))
        for total, weight in zip(totals, weights, strict=True)
    )
