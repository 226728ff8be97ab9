"""`intarsia inspect`: what a model, a recipe or a run folder holds."""

from __future__ import annotations

from typing import Annotated

import typer

from intarsia.cli import options
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model (folder, hub id or `demo`), a recipe (.yaml) or a run folder.",
            show_default=False,
        ),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Show what a model, a recipe or a run folder holds, without loading weights."""
    with guard() as stdout:
        from intarsia.stages.inspect import inspect as stage

        show(stage(source), to=stdout, as_json=as_json)
