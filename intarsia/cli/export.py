"""`intarsia export`: a model as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from intarsia.cli import options
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def export(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the exported model.", show_default=False)],
    gguf: Annotated[
        Literal["F16", "Q8_0", "F32", "BF16"], typer.Option(help="How the file stores matrices; vectors are in F32.")
    ] = "F16",
    tokenizer_pre: Annotated[
        str | None,
        options.valued("NAME", "What llama.cpp calls the tokenizer's rule for splitting text (default: found out)."),
    ] = None,
    revision: options.Revision = None,
    dequantize: options.Dequantize = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a model as a GGUF file, for llama.cpp and Ollama (Llama, Mistral, Qwen2 and Qwen3 families)."""
    with guard() as stdout:
        from intarsia.checkpoint.resolve import asked_for
        from intarsia.stages.export import export as stage
        from intarsia.stages.push import push_later

        progress = display(quiet=quiet or as_json)
        send_off = push_later(push_to_hub, private=private, progress=progress)
        result = stage(
            asked_for(model, dequantize=dequantize),
            out,
            gguf=gguf,
            tokenizer_pre=tokenizer_pre,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
        show(send_off(result, out), to=stdout, as_json=as_json)
