"""A checkpoint as one GGUF file, written tensor by tensor; the file appears whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.checkpoint.gguf_source import need_gguf
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.staging import check_room
from intarsia.disk import replaced
from intarsia.errors import UserError
from intarsia.progress import Progress, Silent
from intarsia.runtimes.gguf_hparams import Hparams, add_hparams, hparams
from intarsia.runtimes.gguf_tensors import FILE_TYPES, KINDS, GgufTensor, entries_of, tensors_of
from intarsia.runtimes.gguf_tokenizer import GgufTokenizer, add_tokenizer, gguf_tokenizer

_PADDING = 32


@dataclass(frozen=True, kw_only=True)
class GgufPlan:
    """All that a file will hold, but for the weights themselves."""

    kind: str
    name: str
    shape: Hparams
    tokenizer: GgufTokenizer
    tensors: tuple[GgufTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(-(-tensor.nbytes // _PADDING) * _PADDING for tensor in self.tensors)


def plan_gguf(
    checkpoint: Checkpoint, tokenizer: Any, kind: str, *, name: str, tokenizer_pre: str | None = None
) -> GgufPlan:
    """Everything about a file that can be known, and be wrong, before a weight is read.

    Args:
        tokenizer: the checkpoint's own, as transformers loads it.
        kind: one of `KINDS`, for matrices; vectors are always in 32 bits.
        name: what the file calls the model.
        tokenizer_pre: what llama.cpp calls the tokenizer's rule for splitting text, where that is not found out.

    Raises:
        UserError: the package `gguf` is not there, or the model cannot be written as GGUF.
    """
    if kind not in KINDS:
        raise UserError.of(
            where="--gguf", expected=f"one of {', '.join(KINDS)}", found=repr(kind), remedy="Choose one of them."
        )
    need_gguf("export --gguf", extra="gguf")
    shape = hparams(checkpoint)
    return GgufPlan(
        kind=kind,
        name=name,
        shape=shape,
        tokenizer=gguf_tokenizer(checkpoint.folder, tokenizer, shape.vocabulary, pre=tokenizer_pre),
        tensors=tuple(tensors_of(checkpoint, shape, kind)),
    )


def check_file(out: Path, *, overwrite: bool, nbytes: int = 0) -> None:
    """Whether the file can be written, asked before any work.

    Raises:
        UserError: it is there already, is a folder, or the disk is too small.
    """
    remedy = "Choose another name for the file."
    if out.is_dir():
        raise UserError.of(where=str(out), expected="a file that can be made", found="a folder", remedy=remedy)
    if out.exists() and not overwrite:
        raise UserError.of(
            where=str(out),
            expected="an output file that does not exist yet",
            found="a file",
            remedy="Choose another one, or pass --overwrite to replace it.",
        )
    check_room(out, nbytes)


def write_gguf(checkpoint: Checkpoint, plan: GgufPlan, out: Path, progress: Progress | None = None) -> None:
    """Write the file; a few rows of one tensor are in memory at a time.

    Raises:
        UserError: a value does not fit, or the disk is full. Nothing is left behind then.
    """
    import gguf

    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        replaced(out) as staged,
        (progress or Silent()).task(f"writing {out.name}", plan.nbytes) as task,
    ):
        writer = gguf.GGUFWriter(staged, plan.shape.architecture)
        try:
            writer.add_type("model")
            writer.add_name(plan.name)
            writer.add_file_type(FILE_TYPES[plan.kind])
            if plan.kind == "Q8_0":
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_hparams(writer, plan.shape)
            add_tokenizer(writer, plan.tokenizer)
            for tensor in plan.tensors:
                kind = gguf.GGMLQuantizationType[tensor.kind]
                writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (stream,) = writer.fout
            writer.write_padding(stream, stream.tell())
            for tensor in plan.tensors:
                written = 0
                for rows in entries_of(tensor, checkpoint, plan.shape):
                    stream.write(rows.data)
                    written += rows.nbytes
                    task.advance(rows.nbytes)
                assert written == tensor.nbytes, f"{tensor.name}: planned {tensor.nbytes} bytes, wrote {written}"
                writer.write_padding(stream, tensor.nbytes)
        finally:
            writer.close()
