"""`intarsia export`: write a model as a GGUF file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from intarsia import progress
from intarsia.commands.push import push_later
from intarsia.flags import Flag, Result
from intarsia.options import ModelRef


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """A written file."""

    model: str
    out: Path
    gguf: str
    architecture: str
    tokenizer: str
    layers: int
    # positions up to which it equals the checkpoint
    context: int
    tensors: int
    bytes: int
    seconds: float
    # the upload to the hub
    push: Mapping[str, Any] | None = None


def export(
    model: ModelRef | str | Path,
    out: Annotated[Path, Flag(names=("--out", "-o"), metavar="FILE", help="The GGUF file to write.")],
    *,
    gguf: Annotated[
        Literal["F16", "Q8_0", "F32", "BF16"], Flag(help="Type of the matrices in the file; vectors are F32.")
    ] = "F16",
    tokenizer_pre: Annotated[
        str | None,
        Flag(metavar="NAME", help="llama.cpp's name of the tokenizer's splitting rule (default: detected)."),
    ] = None,
    overwrite: Annotated[bool, Flag(help="Replace the file if it exists.")] = False,
    push_to: Annotated[
        str | None,
        Flag(
            names=("--push-to-hub",),
            metavar="NAME",
            help="Upload the file to the HuggingFace hub, as `name` or `owner/name`.",
        ),
    ] = None,
    private: Annotated[bool, Flag(help="Make a new hub repository private.")] = False,
) -> ExportResult:
    """Write a model as a GGUF file, for llama.cpp and Ollama (Llama, Mistral, Qwen2 and Qwen3 families).

    Raises:
        UserError: the model cannot be written as GGUF, or the file cannot be written.
    """
    from intarsia.checkpoint.resolve import inputs_of, open_checkpoint
    from intarsia.commands.job import load_tokenizer
    from intarsia.disk import check_file, check_no_input
    from intarsia.exporting.gguf import plan_gguf, write_gguf

    started = time.perf_counter()
    ref, out = ModelRef.of(model), Path(out)
    check_no_input(out, inputs_of(models=[ref]))
    check_file(out, overwrite=overwrite)
    send_off = push_later(push_to, private=private)
    checkpoint = open_checkpoint(ref)
    check_no_input(out, [checkpoint.folder])
    name = checkpoint.folder.resolve().name
    plan = plan_gguf(checkpoint, load_tokenizer(checkpoint), gguf, name=name, tokenizer_pre=tokenizer_pre)
    check_file(out, overwrite=overwrite, nbytes=plan.nbytes)
    if plan.shortened is not None:
        progress.current().say(f"context length {plan.context:,}: {plan.shortened}")
    write_gguf(checkpoint, plan, out)
    result = ExportResult(
        model=checkpoint.model,
        out=out,
        gguf=gguf,
        architecture=plan.graph,
        tokenizer=f"{plan.tokenizer.model}, {plan.tokenizer.pre}",
        layers=plan.layers,
        context=plan.context,
        tensors=len(plan.tensors),
        bytes=out.stat().st_size,
        seconds=time.perf_counter() - started,
    )
    return send_off(result, out)
