"""The stage `prune-comp`: where layers were dropped, hidden states are scaled to the size that they had after them.

Source: Chen et al., Prune&Comp, arXiv 2507.18212. With H^a and H^b of the original before and after a dropped run, the
scale is alpha = E[E_t|H^b_c| / E_t|H^a_c|]: means of absolute values over the tokens of a sequence, and of their
ratios over sequences and channels c. Published, the embedding and what all layers before the run write are multiplied
by alpha. Here what all layers after it write is divided by alpha: every layer, and the final norm, reads the hidden
states through a norm, so this is the same model, and it leaves the embedding, which may be the head's, as it is.

Deviations: of several runs each alpha is measured on the original (published: one layer is dropped at a time, and
alpha measured on the model so far); a scale that does not lower the perplexity of the selection text is not taken, as
of every stage.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from intarsia.errors import check
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from intarsia.activations.loop import Passed
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe


@heal_stage("prune-comp", paper="2507.18212")
def prune_comp(context: HealContext, recipe: Recipe) -> Recipe:
    """Compensate for the smaller hidden states where layers were dropped."""
    from intarsia.architecture.spec import PARTS

    architecture = context.variants[recipe.base].architecture
    check(
        (
            all(architecture.norm_before(part) is not None for part in PARTS),
            f"prune-comp needs layers that read a norm's output; in {architecture.family.title} they do not.",
            "Use closed-form, which fits these models too.",
        )
    )
    ratios, context.facts["forwards"] = magnitude_ratios(context, recipe)
    fitted = {index: dict(tensors) for index, tensors in recipe.fitted.items()}
    factor = 1.0
    for index in range(len(recipe.layers)):
        if factor != 1.0:
            fitted[index] = fitted.get(index, {}) | _scaled(context, recipe, index, factor)
        if index in ratios:
            alpha = float(ratios[index].mean())
            factor /= alpha
            context.details.append({"layer": index, "alpha": alpha})
    return replace(recipe, fitted=fitted)


def magnitude_ratios(
    context: HealContext, recipe: Recipe, rotation_DD: Tensor | None = None
) -> tuple[dict[int, Tensor], int]:
    """For each layer that stands for dropped ones E[E_t|H^b_c| / E_t|H^a_c|], by channel: float64 `[D]`, on the CPU.

    Args:
        rotation_DD: of hidden states, before their sizes are taken.

    Returns:
        Also the layer-forwards over the calibration text.
    """
    from intarsia.healing.span_outputs import span_outputs

    sums: dict[int, Tensor] = {}
    numbers: dict[int, int] = {}

    def sizes(h_BTD: Tensor, counts_BT: Tensor) -> Tensor:
        h_BTD = h_BTD.float() if rotation_DD is None else h_BTD.float() @ rotation_DD.to(h_BTD.device).float()
        return (h_BTD.abs() * counts_BT[..., None]).sum(dim=1).cpu().double()  # tokens divide both, and cancel

    def look(index: int, module: nn.Module, passed: Passed, wanted_BTD: Tensor, counts_BT: Tensor) -> None:
        real_B = counts_BT.any(dim=1).cpu()
        counts_BT = counts_BT.to(wanted_BTD.device)
        after_BD, before_BD = (sizes(h_BTD, counts_BT)[real_B] for h_BTD in (wanted_BTD, passed.after))
        ratio_D = (after_BD / before_BD.clamp_min(1e-12)).sum(dim=0)
        sums[index] = ratio_D if index not in sums else sums[index] + ratio_D
        numbers[index] = numbers.get(index, 0) + int(real_B.sum())

    forwards = span_outputs(context, recipe, look)
    return {index: total_D / max(numbers[index], 1) for index, total_D in sums.items()}, forwards


def _scaled(context: HealContext, recipe: Recipe, index: int, factor: float) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a layer that decide the size of what it writes, times a factor."""
    import torch

    from intarsia.architecture.spec import PARTS
    from intarsia.building.layer import layer_tensors, scale_output
    from intarsia.healing.closed_form import spool_of
    from intarsia.recipe.schema import spooled

    architecture = context.variants[recipe.base].architecture
    tensors = layer_tensors(
        recipe.layers[index],
        architecture,
        lambda source, name: context.variants[source.variant].layer_tensor(source.layer, name),
    )
    tensors |= {name: torch.from_numpy(array) for name, array in recipe.fitted.get(index, {}).items()}
    before = dict(tensors)
    for part in PARTS:
        scale_output(tensors, part, factor, architecture)
    changed = {name: tensor.float().numpy() for name, tensor in tensors.items() if tensor is not before[name]}
    spool = spool_of(context.resident, context.memory_budget)
    if spool is None:
        return changed
    return {name: spooled([array], array.shape, spool) for name, array in changed.items()}
