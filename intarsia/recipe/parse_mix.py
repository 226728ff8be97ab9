"""How several layers are combined, as it stands in a recipe file."""

from __future__ import annotations

from typing import Any

from intarsia.recipe.methods import METHODS, with_defaults
from intarsia.recipe.ops import MergeMethod, Mix
from intarsia.recipe.values import Values, shown

MAX_LAYERS = 10_000


def parse_mix(values: Values, found: dict[str, Any], path: str, sources: int) -> Mix:
    """How `sources` layers are combined, from a mapping with `method`, `weights` and `params`.

    What is left out is linear, of equal weights, with the method's usual parameters.
    """
    wanted = found.get("method", "linear")
    method: MergeMethod | None = next((known for known in METHODS if known == wanted), None)
    if method is None:
        method = "linear"
        values.wrong(f"{path}.method", f"one of {', '.join(METHODS)}", shown(wanted))
    weights = tuple(1.0 / sources for _ in range(sources))
    if "weights" in found:
        shares = values.array(found["weights"], f"{path}.weights", MAX_LAYERS)
        weights = tuple(values.number(entry, f"{path}.weights[{index}]") for index, entry in enumerate(shares))
    params: dict[str, float] = {}
    known = METHODS[method].parameters
    given = found.get("params", {})
    if not known:
        if given != {}:
            values.wrong(f"{path}.params", f"none, for {method} has no parameters", shown(given), "Remove them.")
        return Mix(weights=weights, method=method)
    for name, value in values.mapping(given, f"{path}.params", tuple(known)).items():
        if name in known and known[name].holds(value):
            params[name] = value if known[name].whole else float(value)
        elif name in known:
            values.wrong(f"{path}.params.{name}", str(known[name]), shown(value))
    return Mix(weights=weights, method=method, params=with_defaults(method, params))
