"""The stage `replaceme`: one linear map for each run of dropped layers, folded into the down_proj before it.

Source: Shopkhoev et al., ReplaceMe, arXiv 2505.02819, the least-squares form. With M what the MLP of the layer before
the run adds, Y the rest of that layer's output and L the hidden state after the run, all of the original, the map is
T = argmin |M T + Y - L|^2 (+ ridge |T|^2), over all tokens alike, and down_proj becomes T^t W. Deviations: the ridge is
relative; a layer that was merged, or joined from half layers, gets a map too, fitted on its own output; a map that does
not lower the perplexity of the selection text is not taken, as of every stage.

Shape suffixes: `N` tokens, `C` what the MLP adds, `D` residual width (both are the model's width).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from intarsia.errors import UserError, check
from intarsia.flags import flag
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from intarsia.activations.loop import Passed
    from intarsia.healing.pipeline import HealContext
    from intarsia.healing.ridge import Gram
    from intarsia.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ReplaceMeSettings:
    """How the maps are fitted."""

    # Ridge of the least squares, relative to the mean square of what the MLP adds: it shrinks the map towards zero.
    ridge: float = flag(0.0, "--map-ridge")

    def __post_init__(self) -> None:
        right = 0.0 <= self.ridge < float("inf")
        check((right, f"--map-ridge is {self.ridge}; it is a number, 0 or more.", "Leave it out for none."))


@heal_stage("replaceme", settings=ReplaceMeSettings, paper="2505.02819")
def replaceme(context: HealContext, recipe: Recipe, settings: ReplaceMeSettings) -> Recipe:
    """Fit a linear map for each run of dropped layers, and fold it into the down_proj before it."""
    import torch
    from torch.nn.functional import linear

    from intarsia.healing.ridge import Gram
    from intarsia.healing.span_outputs import span_outputs

    architecture = context.variants[recipe.base].architecture
    check(
        (
            not architecture.removal_only
            and not architecture.is_mixture("mlp")
            and architecture.norm_after("mlp") is None,
            f"replaceme needs an MLP whose down_proj is added as it is; in {architecture.family.title} it is not.",
            "Use closed-form, which fits these models too.",
        )
    )
    writer, scale = architecture.writer("mlp").module, architecture.residual_scale
    moments: dict[int, Gram] = {}  # of what an MLP adds, and of what is missing: in float64, as published
    own: dict[int, dict[str, Tensor]] = {}

    def look(index: int, module: nn.Module, passed: Passed, wanted_BTD: Tensor, counts_BT: Tensor) -> None:
        down = module.get_submodule(writer)
        if index not in own:  # of a streamed model they are there only now
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
