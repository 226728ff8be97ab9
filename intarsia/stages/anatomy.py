"""Which families are known, and what is exact in each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.architecture.families import Family, known_families, with_family_file


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """One family. `exact`: whether all of a merged layer's pieces compute what they did; `approximated`: what does not.

    `never_merged`: what cannot be merged at all.
    """

    title: str
    model_types: tuple[str, ...]
    exact: bool
    approximated: tuple[str, ...]
    never_merged: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "approximated": "; ".join(self.approximated)}


@dataclass(frozen=True, kw_only=True)
class Families:
    """Every known family. `exact`: pieces of a merged layer compute what they computed in their own layers."""

    families: tuple[FamilyRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"families": [row.to_dict() for row in self.families]}


def families(*, family_file: Path | None = None) -> Families:
    """Every family that this version knows, and that of a file, if one is named.

    Raises:
        UserError: the file is no family file.
    """
    with with_family_file(family_file):
        return Families(families=tuple(_row(family) for _, family in sorted(known_families().items())))


def _row(family: Family) -> FamilyRow:
    mixed = any((entry.field == "layer_types" and entry.every) or entry.kinds for entry in family.per_layer)
    return FamilyRow(
        title=family.title,
        model_types=family.model_types,
        exact=not family.approximations,
        approximated=family.approximations,
        never_merged="layers that attend in different ways" if mixed else None,
    )
