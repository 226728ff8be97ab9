"""The methods by which a search may blend layers: those of recipes, and two that need statistics of the models.

RegMean (arXiv 2212.09849) and Fisher averaging (arXiv 2111.09832) are no methods of a recipe, which holds no
statistics: in a recipe such a layer is a weighted average with the result among its fitted tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from intarsia.recipe import methods
from intarsia.recipe.methods import Method
from intarsia.recipe.ops import MergeMethod

Statistic = Literal["regmean", "fisher"]
BlendMethod: TypeAlias = MergeMethod | Statistic

STATISTICS: tuple[Statistic, ...] = ("regmean", "fisher")
_RECIPES: Mapping[MergeMethod, Method] = methods.METHODS
METHODS: Mapping[BlendMethod, Method] = {
    **{name: method for name, method in _RECIPES.items()},  # noqa: C416  (another type of key)
    "regmean": Method(base=False, least=2, weights="sum 1"),
    "fisher": Method(base=False, least=2, weights="sum 1"),
}
