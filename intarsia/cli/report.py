"""`intarsia report`: one page about one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import options
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders of `plan`, comparisons, and models that intarsia has made.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file.")] = Path("report.html"),
    generate: Annotated[
        bool, typer.Option("--generate", help="Let each model and its original answer prompts, side by side.")
    ] = False,
    prompt: Annotated[list[str] | None, options.valued("TEXT", "What they answer; may be given several times.")] = None,
    new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 96,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML file that shows what runs did. It opens anywhere and needs no network."""
    with guard() as stdout:
        from intarsia.stages.report import PROMPTS
        from intarsia.stages.report import report as stage

        result = stage(
            *runs,
            out=out,
            generate=generate,
            prompts=prompt or PROMPTS,
            new_tokens=new_tokens,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            progress=display(quiet=quiet or as_json),
        )
        show(result, to=stdout, as_json=as_json)
