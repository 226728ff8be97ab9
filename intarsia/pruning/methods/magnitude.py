"""Magnitude and Magnitude+: drop the layers whose weights are smallest.

Source: Kim et al., Shortened LLaMA, arXiv 2402.02834: the score of a layer is sum_k sum_ij |W^k_ij| over its linear
weights W^k. The plus variant never drops the first four and the last two layers.

Deviation: norm weights do not count, as the paper has it (its code adds them; they are some thousandths of the sum).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from intarsia.pruning.step import OneShot
from intarsia.registry import planner

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.pruning.intermediate import Intermediate

PROTECTED = (4, 2)
"""First and last layers that the plus variants of the paper never drop."""


@planner("magnitude", paper="2402.02834")
class Magnitude(OneShot):
    """Drop the layers whose weights are smallest."""

    passes = 0

    def score(self, model: Intermediate) -> list[float]:
        """The sum of absolute linear weights of each layer."""
        return [
            sum(float(_row_sums(weight).sum()) for weight in linear_weights(model, index))
            for index, _ in enumerate(model.resident.walk(model.modules))
        ]


@planner("magnitude+", paper="2402.02834")
class MagnitudePlus(Magnitude):
    """Drop the layers whose weights are smallest, of those between the first four and the last two."""

    protect = PROTECTED


def linear_weights(model: Intermediate, index: int) -> list[Tensor]:
    """The weights of the linear modules of a layer (awake), in the architecture's order; of experts all together."""
    from intarsia.building.layer import parameter_name

    architecture = model.architecture
    if architecture.removal_only:
        return [each for each in model.modules[index].parameters() if each.dim() > 1 and each.is_floating_point()]
    names = [f"{architecture.modules(linear)[0]}.weight" for linear in architecture.linears]
    parameters = dict.fromkeys(parameter_name(name, architecture) for name in names)
    return [model.modules[index].get_parameter(name) for name in parameters]


def _row_sums(weight_DC: Tensor) -> Tensor:
    import torch

    return weight_DC.detach().abs().sum(dim=1, dtype=torch.float32).double()
