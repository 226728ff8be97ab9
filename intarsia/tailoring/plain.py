"""Candidates as plain data for a log, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from intarsia.recipe.ops import MergeMethod
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep


def to_plain(candidate: Candidate) -> dict[str, Any]:
    """A candidate in values that JSON knows; `from_plain` gives the candidate back."""
    return {"positions": list(candidate.positions), "choices": [_choice(choice) for choice in candidate.choices]}


def from_plain(data: Mapping[str, Any]) -> Candidate:
    """The candidate of `to_plain`.

    Raises:
        KeyError, TypeError, ValueError: it is no such data.
    """
    choices = tuple(_choice_of(choice) for choice in data["choices"])
    positions = tuple(int(position) for position in data["positions"])
    if len(positions) != len(choices):
        raise ValueError(f"{len(positions)} positions with {len(choices)} choices")
    return Candidate(positions=positions, choices=choices)


def _choice(choice: Choice) -> dict[str, Any]:
    if isinstance(choice, Join):
        return {"first": choice.first, "second": choice.second, "share": choice.share}
    found: dict[str, Any] = {"attention": _blend(choice.attention)}
    if choice.mlp is not None:
        found["mlp"] = _blend(choice.mlp)
    if choice.scale != 1.0:
        found["scale"] = choice.scale
    return found


def _choice_of(data: Mapping[str, Any]) -> Choice:
    if "first" in data:
        return Join(first=str(data["first"]), second=str(data["second"]), share=float(data["share"]))
    mlp = _blend_of(data["mlp"]) if "mlp" in data else None
    return Keep(attention=_blend_of(data["attention"]), mlp=mlp, scale=float(data.get("scale", 1.0)))


def _blend(blend: Blend) -> dict[str, Any]:
    if blend.method is None:
        return {"members": list(blend.members)}
    return {"members": list(blend.members), "method": blend.method, "values": dict(blend.values)}


def _blend_of(data: Mapping[str, Any]) -> Blend:
    values = tuple((str(name), float(value)) for name, value in data.get("values", {}).items())
    method = data.get("method")
    found = None if method is None else cast(MergeMethod, str(method))
    return Blend(members=tuple(map(str, data["members"])), method=found, values=values)
