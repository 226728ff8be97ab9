"""`intarsia eval ...`: how good a model is."""

from __future__ import annotations

from typing import Annotated

import typer

from intarsia.cli import options
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def perplexity(
    model: options.Model,
    text: Annotated[
        str,
        typer.Option(metavar="FILE", help="Text; `file.txt#0.9:1` is its last tenth.", show_default=False),
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(help="How many windows, from the start of the text; 0 for all.")] = 64,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity of a model on a text, over windows that do not overlap."""
    with guard() as stdout:
        from intarsia.stages.evaluate import evaluate_perplexity

        result = evaluate_perplexity(
            model,
            text,
            seq_len=seq_len,
            windows=windows or None,
            revision=revision,
            device=device,
            dtype=dtype,
            progress=display(quiet=quiet or as_json),
        )
        show(result, to=stdout, as_json=as_json)
