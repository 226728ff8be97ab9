"""`intarsia verify`: does a model folder keep what every runtime expects of one?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A local model folder.", show_default=False)],
    max_shard_size: options.MaxShardSize = "5GB",
    load: Annotated[
        bool, typer.Option(help="Also load the model, and compare generation with and without cache.")
    ] = True,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a model folder is a stock checkpoint: whole, consistent, and loading everywhere.

    Exit code 0: it is. 1: a check failed. 2: there is nothing to check.
    """
    with guard() as stdout:
        max_shard_bytes = values.byte_count(max_shard_size)
        from intarsia.stages.verify import verify as stage

        result = stage(folder, max_shard_bytes=max_shard_bytes, load=load, progress=display(quiet=quiet or as_json))
        show(result, to=stdout, as_json=as_json)
        if not result.kept:
            raise SystemExit(1)
