"""`intarsia push`: a model folder or an exported file goes to the HuggingFace hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import options
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def push(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER|FILE", help="A built model, or an exported file.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(metavar="NAME", help="`name` or `owner/name`.", show_default=False)],
    private: options.Private = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Send a model with its card to the HuggingFace hub."""
    with guard() as stdout:
        from intarsia.stages.push import push as stage

        result = stage(source, repository, private=private, dry_run=dry_run, progress=display(quiet=quiet or as_json))
        show(result, to=stdout, as_json=as_json)
