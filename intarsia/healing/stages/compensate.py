"""The stages `replaceme` and `prune-comp`: published compensations for runs of dropped layers.

Both compare the output of a layer with span (a, b] on the original's H^a with the original's H^b. For an unchanged
layer before a dropped run, that output is the original's hidden state before the run.

`replaceme` folds one linear map for each run into the down_proj before it. Source: Shopkhoev et al., ReplaceMe, arXiv
2505.02819, the least-squares form. With M what the MLP of the layer before the run adds, Y the rest of that layer's
output and L the hidden state after the run, all of the original, the map is T = argmin |M T + Y - L|^2 (+ ridge
|T|^2), over all tokens alike, and down_proj becomes T^t W. Deviations: the ridge is relative; a layer that was merged,
or joined from half layers, gets a map too, fitted on its own output.

`prune-comp` scales hidden states to the size that they had after the run. Source: Chen et al., Prune&Comp, arXiv
2507.18212. The scale is alpha = E[E_t|H^b_c| / E_t|H^a_c|]: means of absolute values over the tokens of a sequence, and
of their ratios over sequences and channels c. Published, the embedding and what all layers before the run write are
multiplied by alpha. Here the outputs of all layers after the run are divided by alpha: every layer, and the final norm,
reads the hidden states through a norm, so this is the same model, and the embedding, which may be tied to the head,
stays unchanged.
Deviation: of several runs each alpha is measured on the original (published: one layer is dropped at a time, and alpha
measured on the model so far).

As with every stage, a result that does not lower the perplexity of the selection text is rejected.

Shape suffixes: `B` sequences of a batch, `T` tokens, `N` tokens, `C` outputs of the MLP, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from intarsia.architecture.spec import PARTS, Part
from intarsia.errors import UserError, check
from intarsia.flags import flag
from intarsia.healing.settings import Check, Checked
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from intarsia.activations.loop import Passed
    from intarsia.healing.pipeline import HealContext
    from intarsia.healing.ridge import Gram
    from intarsia.recipe.recipe import Recipe


Look: TypeAlias = "Callable[[int, nn.Module, Passed, Tensor, Tensor], None]"
"""Takes a layer's index and module, a batch that passed it, H^b of the original `[B, T, D]`, and which tokens are real
`[B, T]`."""


def span_outputs(context: HealContext, recipe: Recipe, look: Look, *, inputs: Sequence[Part] = ()) -> int:
    """Run every layer whose span is several original layers over the calibration text.

    Args:
        inputs: parts whose output projections' inputs `look` gets too.

    Returns:
        Layer-forwards over the text.

    Raises:
        UserError: no layer's span is several layers, or hidden states are not finite.
    """
    import torch

    from intarsia.activations.loop import Loop
    from intarsia.building.loaded_model import Placed

    changed = [index for index, (start, stop) in enumerate(recipe.spans) if stop - start > 1]
    check((bool(changed), "The recipe drops no layer, so there is nothing to replace.", "Prune the model first."))
    resident = context.resident
    with torch.inference_mode(), context.original_states(context.calibration) as teacher:
        modules = [resident.module(recipe.layers[index], recipe.fitted.get(index)) for index in changed]
        before = teacher.cost
        teacher.learn({edge for index in changed for edge in recipe.spans[index]})
        loop = Loop(resident, teacher.batches, memory_budget=context.memory_budget)
        for index, module in zip(changed, resident.walk(modules), strict=True):
            start, stop = recipe.spans[index]

            def then(passed: Passed, index: int = index, module: nn.Module = module, stop: int = stop) -> None:
                real_BT = torch.ones_like(passed.ids, dtype=torch.bool) if passed.mask is None else passed.mask.bool()
                look(index, module, passed, teacher.at(stop, passed.rows), real_BT)

            layer = Placed(module, recipe.layers[index].sources[0].layer)
            name = f"output of layer {index}"
            loop.layer(layer, partial(teacher.at, start), then, inputs=inputs, name=name)
        return teacher.cost - before + len(changed)


@dataclass(frozen=True, kw_only=True)
class ReplaceMeSettings(Checked):
    """How the maps are fitted."""

    # Ridge of the least squares, relative to the mean square of the MLP's output; it shrinks the map towards zero.
    ridge: float = flag(0.0, "--map-ridge")

    def checks(self) -> Iterator[Check]:
        """What must hold."""
        yield 0.0 <= self.ridge < float("inf"), ("ridge",), "a number, 0 or more"


@heal_stage("replaceme", settings=ReplaceMeSettings, paper="2505.02819")
def replaceme(context: HealContext, recipe: Recipe, settings: ReplaceMeSettings) -> Recipe:
    """Fit a linear map for each run of dropped layers, and fold it into the down_proj before it."""
    import torch
    from torch.nn.functional import linear

    from intarsia.healing.ridge import Gram

    architecture = context.variants[recipe.base].architecture
    check(
        (
            not architecture.removal_only
            and not architecture.is_mixture("mlp")
            and architecture.norm_after("mlp") is None,
            f"replaceme needs an MLP without router or norm after it, and {architecture.family.title} has none.",
            "Use closed-form, which fits these models too.",
        )
    )
    writer, scale = architecture.writer("mlp").module, architecture.residual_scale
    moments: dict[int, Gram] = {}  # of the MLP's output and the missing residual: in float64, as published
    own: dict[int, dict[str, Tensor]] = {}

    def look(index: int, module: nn.Module, passed: Passed, wanted_BTD: Tensor, counts_BT: Tensor) -> None:
        down = module.get_submodule(writer)
        if index not in own:  # a streamed layer has them only now
            own[index] = {name: each.detach().clone() for name, each in down.named_parameters()}
            width, home = architecture.width, wanted_BTD.device
            moments[index] = Gram(width, width, home, torch.float32 if home.type == "mps" else torch.float64)
        x_BTC = passed.inputs["mlp"].reshape(*passed.after.shape[:2], -1)
        added_BTD = linear(x_BTC, *own[index].values())
        missing_BTD = (wanted_BTD.float() - passed.after.float()) / scale
        moments[index].add(added_BTD[counts_BT], missing_BTD[counts_BT], counts_BT[counts_BT])

    context.facts["forwards"] = span_outputs(context, recipe, look, inputs=("mlp",))
    fitted = {index: dict(tensors) for index, tensors in recipe.fitted.items()}
    with torch.inference_mode():  # as the moments were summed
        for index, gram in moments.items():
            map_CD = _map(gram, settings.ridge)
            if map_CD is None:
                raise UserError(
                    f"replaceme: the calibration text does not determine the map after layer {index}.",
                    "Give more --tokens, or a small --map-ridge, such as 1e-6.",
                )
            changed = {f"{writer}.{name}": map_CD.T @ tensor.to(map_CD) for name, tensor in own[index].items()}
            fitted[index] = fitted.get(index, {}) | {name: each.float().cpu().numpy() for name, each in changed.items()}
            change_DC = (map_CD - torch.eye(len(map_CD)).to(map_CD)).T
            before, after = (gram.error(change) * scale**2 for change in (None, change_DC))
            context.details.append({"layer": index, "module": writer, "error_before": before, "error_after": after})
    return replace(recipe, fitted=fitted)


def _map(gram: Gram, ridge: float) -> Tensor | None:
    """The map T `[C, D]` of least error; None where the moments do not determine it."""
    import torch

    aa_CC, missing_CD = gram.moments()
    eye_CC = torch.eye(len(aa_CC), dtype=aa_CC.dtype, device=aa_CC.device)
    factor_CC, failed = torch.linalg.cholesky_ex(aa_CC + ridge * aa_CC.diagonal().mean() * eye_CC)
    if int(failed) or (ridge == 0.0 and gram.tokens < len(aa_CC)):
        return None
    return torch.cholesky_solve(aa_CC + missing_CD, factor_CC)


@heal_stage("prune-comp", paper="2507.18212")
def prune_comp(context: HealContext, recipe: Recipe) -> Recipe:
    """Compensate for the smaller hidden states where layers were dropped."""
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
    """For each layer before a dropped run, E[E_t|H^b_c| / E_t|H^a_c|] by channel: float64 `[D]`, on the CPU.

    Args:
        rotation_DD: of hidden states, before their sizes are taken.

    Returns:
        Also the layer-forwards over the calibration text.
    """
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
    """The tensors that scale a layer's output, times a factor."""
    import torch

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
