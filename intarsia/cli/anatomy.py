"""`intarsia anatomy`: which model families are known, and whether one is described rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import options
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show

FamilyFile = Annotated[
    Path | None,
    typer.Option(
        "--family-file", metavar="FILE.toml", help="A family that is not in the package yet.", show_default=False
    ),
]


def list_families(family_file: FamilyFile = None, as_json: options.AsJson = False) -> None:
    """Every known family: its model types, what is exact when layers are merged, and what is approximated."""
    with guard() as stdout:
        from intarsia.stages.anatomy import families

        show(families(family_file=family_file), to=stdout, as_json=as_json)


def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_FOLDER",
            help="A config.json or a folder with one (a hub id or `demo` will do). Weights are not needed.",
            show_default=False,
        ),
    ],
    family_file: FamilyFile = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Check a family on a small random model like that of a config; exit code 1 if a check fails."""
    with guard() as stdout:
        from intarsia.stages.anatomy_check import check_family

        result = check_family(source, family_file=family_file, progress=display(quiet=quiet or as_json))
        show(result, to=stdout, as_json=as_json)
        if not result.passed:
            raise SystemExit(1)
