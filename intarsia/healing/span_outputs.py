"""Output layers that stand for dropped ones, run on the original's own hidden states.

A layer with span (a, b] gets H^a of the original; what it gives is compared with H^b. Where layers were dropped after
it, and it is an original layer as it was, what it gives is the original's hidden state before the dropped run.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from intarsia.activations.loop import Loop, Passed
from intarsia.architecture.spec import Part
from intarsia.building.recipe_layers import Placed
from intarsia.errors import check
from intarsia.healing.pipeline import HealContext
from intarsia.recipe.recipe import Recipe

Look: TypeAlias = Callable[[int, nn.Module, Passed, Tensor, Tensor], None]
"""Takes a layer's index and module, a batch that passed it, H^b of the original `[B, T, D]`, and which tokens count
`[B, T]`."""


@torch.inference_mode()
def span_outputs(context: HealContext, recipe: Recipe, look: Look, *, inputs: Sequence[Part] = ()) -> int:
    """Run every layer that stands for several of the original over the calibration text.

    Args:
        inputs: parts, the inputs of whose output projections `look` gets too.

    Returns:
        Layer-forwards over the text.

    Raises:
        UserError: no layer stands for several, or hidden states are not finite.
    """
    changed = [index for index, (start, stop) in enumerate(recipe.spans) if stop - start > 1]
    check((bool(changed), "The recipe drops no layer, so nothing is to be replaced.", "Prune the model first."))
    resident = context.resident
    modules = [resident.module(recipe.layers[index], recipe.fitted.get(index)) for index in changed]
    with context.original_states(context.calibration) as teacher:
        before = teacher.cost
        teacher.learn({edge for index in changed for edge in recipe.spans[index]})
        loop = Loop(resident, teacher.batches, memory_budget=context.memory_budget)
        for index, module in zip(changed, resident.walk(modules), strict=True):
            start, stop = recipe.spans[index]

            def then(passed: Passed, index: int = index, module: nn.Module = module, stop: int = stop) -> None:
                wanted_BTD = teacher.at(stop, passed.rows)
                look(index, module, passed, wanted_BTD, _counts(context, passed))

            layer = Placed(module, recipe.layers[index].sources[0].layer)
            name = f"output of layer {index}"
            loop.layer(layer, partial(teacher.at, start), then, inputs=inputs, name=name)
        return teacher.cost - before + len(changed)


def _counts(context: HealContext, passed: Passed) -> Tensor:
    """Real tokens of sequences that were not set aside, `[B, T]`."""
    seen = [row not in context.unseen for row in range(passed.rows.start, passed.rows.stop)]
    counts_BT = torch.tensor(seen, device=passed.ids.device)[:, None].expand(passed.ids.shape)
    return counts_BT if passed.mask is None else counts_BT & passed.mask.bool()
