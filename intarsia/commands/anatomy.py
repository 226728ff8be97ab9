"""`intarsia anatomy list` and `anatomy check`: known model families, and a check of a family's description.

The check prunes, joins, builds and loads layers of a small random model.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from intarsia.architecture.families import known_families, with_family_file
from intarsia.disk import read_json
from intarsia.flags import Flag, Result
from intarsia.model_name import check_model
from intarsia.progress import current, quiet_transformers

if TYPE_CHECKING:
    from intarsia.activations.architecture_checks import CheckRow


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """One family."""

    title: str
    model_types: tuple[str, ...]
    # Whether all pieces of a merged layer compute the same as in their own layers, and which do not.
    exact: bool
    approximated: str
    # What cannot be merged at all.
    never_merged: str | None


@dataclass(frozen=True, kw_only=True)
class Families(Result):
    """Every known family."""

    families: tuple[FamilyRow, ...]


@dataclass(frozen=True, kw_only=True)
class FamilyCheck(Result):
    """The results of all checks."""

    source: str
    family: str
    model_type: str
    kinds_of_layers: str
    # whether no check failed
    passed: bool
    checks: tuple[CheckRow, ...]
    approximations: str | None


FamilyFile: TypeAlias = Annotated[
    Path | None, Flag(metavar="FILE.toml", help="An additional family file; it takes precedence.")
]


def families(*, family_file: FamilyFile = None) -> Families:
    """List every known family: its model types, what is exact when layers are merged, and what is approximated.

    Raises:
        UserError: the file is not a family file.
    """
    with with_family_file(family_file):
        rows = []
        for _, family in sorted(known_families().items()):
            mixed = any((entry.field == "layer_types" and entry.every) or entry.kinds for entry in family.per_layer)
            row = FamilyRow(
                title=family.title,
                model_types=family.model_types,
                exact=not family.approximations,
                approximated="; ".join(family.approximations),
                never_merged="layers of different attention types" if mixed else None,
            )
            rows.append(row)
    return Families(families=tuple(rows))


def check_family(
    source: Annotated[
        str,
        Flag(
            positional=True,
            metavar="CONFIG|FOLDER",
            help="A config.json, a folder with one, a hub id, or `demo`. Weights are not needed.",
        ),
    ],
    *,
    family_file: FamilyFile = None,
) -> FamilyCheck:
    """Check a family on a small random model with the features of a config; exit code 1 if a check fails.

    Raises:
        UserError: there is no config, no family for it, or it has a feature that the family does not cover.
    """
    if not Path(source).is_file():
        check_model(source)
    import torch

    from intarsia.activations.architecture_checks import check_rows
    from intarsia.checkpoint.reader import architecture_of

    with (
        quiet_transformers(),
        with_family_file(family_file),
        tempfile.TemporaryDirectory(prefix="intarsia-anatomy-") as folder,
        torch.no_grad(),
    ):
        config = _config(source)
        large = architecture_of(config, where=source)
        with current().task("checking", 8) as task:
            rows = []
            for row in check_rows(large, Path(folder)):
                rows.append(row)
                task.advance()
        return FamilyCheck(
            source=source,
            family=large.family.title,
            model_type=str(config.get("model_type")),
            kinds_of_layers=", ".join(dict.fromkeys(large.layer_types or ("one",))),
            passed=all(row.result != "failed" for row in rows),
            checks=tuple(rows),
            approximations="; ".join(large.approximations) or None,
        )


def _config(source: str) -> dict[str, Any]:
    from intarsia.checkpoint.reader import read_config
    from intarsia.checkpoint.resolve import resolve
    from intarsia.checkpoint.stored_forms import text_config
    from intarsia.inspection import own_code

    path = Path(source)
    if path.is_file() and path.suffix == ".json":
        remedy = "Get the model's config again."
        config = read_json(path, expected="a config.json: one JSON object", remedy=remedy)
        own_code.admit(path.parent, config)
    else:
        config = read_config(path if path.is_dir() else resolve(source), quantised=True)
    return text_config(config, where=source)
