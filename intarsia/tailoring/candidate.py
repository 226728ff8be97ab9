"""One point of the search space, as plain data that can be compared, hashed and counted.

All numbers stand on grids, so that two candidates are the same or are not. Source of the choices: GPTailor, arXiv
2506.20480 (remove, select, merge), and arXiv 2510.15304 (concatenate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from intarsia.recipe.ops import MergeMethod


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The tensors of one layer index: of one member of the family, or of several, merged.

    `members` are in the family's order. `method` is None where there is one member and nothing is merged; with a method
    on differences to the base (task arithmetic and its kin) the base is never a member. `values` are the method's
    settings, by name and in the order of names: `lead` (the share of the first member; the others have equal shares
    of the rest), `lambda` (how much of the difference is added), `density` (how much of a difference is kept).
    """

    members: tuple[str, ...]
    method: MergeMethod | None = None
    values: tuple[tuple[str, float], ...] = ()

    def value(self, name: str) -> float:
        """A setting of the method."""
        return dict(self.values)[name]

    @property
    def shares(self) -> list[float]:
        """How much each member counts where the method has `lead`: the first as it says, the others alike."""
        rest = 1.0 - self.value("lead")
        return [self.value("lead"), *([rest / (len(self.members) - 1)] * (len(self.members) - 1))]

    def with_value(self, name: str, value: float) -> Blend:
        """The same blend with another value of a setting."""
        values = tuple((key, value if key == name else old) for key, old in self.values)
        return Blend(members=self.members, method=self.method, values=values)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """A layer kept at its index. `mlp` is None where the MLP is as the attention; `scale` multiplies its output."""

    attention: Blend
    mlp: Blend | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Join:
    """A layer of member `first` concatenated with the removed layer behind it, of member `second`.

    `share` of the pieces are the first's.
    """

    first: str
    second: str
    share: float


Choice: TypeAlias = Keep | Join


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What each output layer is. `positions[i]` is the layer of the base at which `choices[i]` stands.

    Positions ascend. A layer that is not among them is removed; in a stack some stand there twice. Where the space has
    groups of layers, a position is the first layer of a group.
    """

    positions: tuple[int, ...]
    choices: tuple[Choice, ...]

    def items(self) -> tuple[tuple[int, Choice], ...]:
        """Positions with their choices."""
        return tuple(zip(self.positions, self.choices, strict=True))


def single(member: str) -> Keep:
    """A whole layer of one member."""
    return Keep(attention=Blend(members=(member,)))


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
