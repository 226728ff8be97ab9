"""Export: a model folder in a form that some runtimes want instead."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.exporting.gguf import check_file, plan_gguf, write_gguf
from intarsia.progress import Progress, Silent
from intarsia.stages.setup import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A written file. `context`: positions for which it gives what the checkpoint gives."""

    model: str
    out: Path
    gguf: str
    architecture: str
    tokenizer: str
    layers: int
    context: int
    tensors: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "out": str(self.out)}


def export(
    model: str,
    out: Path,
    *,
    gguf: str = "F16",
    tokenizer_pre: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a model as a GGUF file for llama.cpp, Ollama and others.

    Args:
        model: a local folder, a hub id, or `demo`.
        gguf: how matrices are stored: F16, Q8_0, F32 or BF16.
        tokenizer_pre: what llama.cpp calls the tokenizer's rule for splitting text, where that is not found out.

    Raises:
        UserError: the model cannot be written as GGUF, or the file cannot be written.
    """
    begun = time.perf_counter()
    out, progress = Path(out), progress or Silent()
    check_file(out, overwrite=overwrite)
    checkpoint = open_checkpoint(model, revision=revision, progress=progress)
    name = checkpoint.folder.resolve().name
    plan = plan_gguf(checkpoint, load_tokenizer(checkpoint), gguf, name=name, tokenizer_pre=tokenizer_pre)
    check_file(out, overwrite=overwrite, nbytes=plan.nbytes)
    if plan.shortened is not None:
        progress.say(f"context length {plan.context:,}: {plan.shortened}")
    write_gguf(checkpoint, plan, out, progress)
    return ExportResult(
        model=model,
        out=out,
        gguf=gguf,
        architecture=plan.graph,
        tokenizer=f"{plan.tokenizer.model}, {plan.tokenizer.pre}",
        layers=plan.layers,
        context=plan.context,
        tensors=len(plan.tensors),
        bytes=out.stat().st_size,
        seconds=time.perf_counter() - begun,
    )
