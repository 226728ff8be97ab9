"""`intarsia build`: a recipe, a depth of a ladder, or a trial of a search becomes a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def build(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|RECIPE", help="A run folder of plan or tailor, or a recipe.", show_default=False),
    ],
    out: options.Out,
    layers: Annotated[int | None, options.valued("N", "Depth to build from a run folder (default: its least).")] = None,
    best: Annotated[str | None, options.valued("NAME", "Of a search: the trial that is best in an objective.")] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="Of a search: the knee of its Pareto front, which is also the default.")
    ] = False,
    trial: Annotated[int | None, options.valued("N", "Of a search: any trial, by its number.")] = None,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Build the model that a recipe describes; nothing is calibrated."""
    with guard() as stdout:
        max_shard_bytes = values.byte_count(max_shard_size)
        from intarsia.stages.build import build as stage
        from intarsia.stages.push import push_later

        progress = display(quiet=quiet or as_json)
        send_off = push_later(push_to_hub, private=private, progress=progress)
        result = stage(
            source,
            out,
            layers=layers,
            best=best,
            knee=knee,
            trial=trial,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        show(send_off(result, out), to=stdout, as_json=as_json)
