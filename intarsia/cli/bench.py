"""`intarsia bench`: speed and memory of models, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [OTHER]...",
            help="Local folders, hub ids, or `demo`; the others are compared with the first.",
            show_default=False,
        ),
    ],
    batch: Annotated[str, typer.Option(metavar="N[,N...]", help="Sequences at once; several may be given.")] = "1",
    prompt_len: Annotated[str, typer.Option(metavar="N[,N...]", help="Tokens a prompt; several may be given.")] = "256",
    new_tokens: Annotated[int, typer.Option(help="Tokens written after each prompt.")] = 64,
    repeats: Annotated[int, typer.Option(help="Measured rounds; their median counts.")] = 5,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Tokens a second while reading and writing, time to the first token, and memory."""
    with guard() as stdout:
        sizes = {"batch": values.numbers(batch, "--batch"), "prompt_len": values.numbers(prompt_len, "--prompt-len")}
        from intarsia.stages.bench import bench as stage

        result = stage(
            *models,
            **sizes,
            new_tokens=new_tokens,
            repeats=repeats,
            device=device,
            dtype=dtype,
            progress=display(quiet=quiet or as_json),
        )
        show(result, to=stdout, as_json=as_json)
