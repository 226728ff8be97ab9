"""What the teacher says of every sequence: from the teacher itself, or from a cache of its likeliest tokens on disk.

The cache is written once for a teacher, a text, a K and a temperature, under a name made of these, and memory-mapped
from then on. It appears whole or not at all.

Shape suffixes: `N` sequences, `T` tokens, `K` kept tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.anatomy.spec import Anatomy
from intarsia.checkpoint.staging import staged_folder
from intarsia.errors import UserError
from intarsia.healing.distiller import Lesson
from intarsia.healing.logit_losses import top_k_of
from intarsia.healing.read_out import ReadOut
from intarsia.healing.settings import EndToEndSettings
from intarsia.healing.text import Text
from intarsia.progress import Progress

_SIGN = "facts.json"
_ROWS = 256


class Teacher:
    """A teacher in memory, without gradients."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, depths: Sequence[int]) -> None:
        """`depths`: those at which hidden states are learnt from."""
        self.read_out = ReadOut(model.eval(), anatomy)
        self.depths = tuple(depths)

    @torch.no_grad()
    def lesson(self, ids_BT: Tensor, mask_BT: Tensor | None, *, logits: bool) -> Lesson:
        """What it says of a batch."""
        rows, hidden = self.read_out.trunk(ids_BT, mask_BT, hidden=bool(self.depths))
        return Lesson(
            rows=rows.reshape(-1, rows.shape[-1]) if logits else None,
            hidden=tuple(hidden[depth] for depth in self.depths),
        )


class TopK:
    """The teacher's K likeliest tokens at every position of a text, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.log_p = np.load(folder / "log_p.npy", mmap_mode="r")
        self.index = np.load(folder / "index.npy", mmap_mode="r")

    def rows(self, sequences: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens of some sequences, `[B * T, K]` each."""
        found = []
        for array in (self.log_p, self.index):
            copied = np.ascontiguousarray(array[list(sequences)])
            found.append(torch.from_numpy(copied).reshape(-1, array.shape[-1]).to(device))
        return found[0], found[1]


def top_k_folder(root: Path, *, teacher_sha256: str, text_sha256: str, k: int, temperature: float) -> Path:
    """Where the cache for these is."""
    facts = json.dumps([1, teacher_sha256, text_sha256, k, temperature])
    return root / f"top-{k}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"


def write_top_k(
    folder: Path,
    text: Text,
    teacher: Callable[[], Teacher],
    settings: EndToEndSettings,
    *,
    vocabulary: int,
    batch: int,
    progress: Progress,
) -> None:
    """Run the teacher over a text and keep its K likeliest tokens; a cache that is there is left as it is.

    Raises:
        UserError: K is more than the vocabulary, the disk is full, or the teacher's logits are not finite.
    """
    assert settings.top_k is not None
    k, temperature, ids_NT, mask_NT = settings.top_k, settings.temperature, text.ids_NT, text.mask_NT
    if k > vocabulary:
        raise UserError.of(
            where="--top-k",
            expected=f"at most {vocabulary}, the size of the vocabulary",
            found=str(k),
            remedy="Ask for fewer tokens, or leave it out to learn from all.",
        )
    if (folder / _SIGN).exists():
        return
    shape = (*ids_NT.shape, k)
    nbytes = ids_NT.numel() * k * 8
    with staged_folder(folder, nbytes=nbytes, sign=_SIGN) as staging:
        log_p = np.lib.format.open_memmap(staging / "log_p.npy", mode="w+", dtype=np.float32, shape=shape)
        index = np.lib.format.open_memmap(staging / "index.npy", mode="w+", dtype=np.int32, shape=shape)
        for name in ("log_p.npy", "index.npy"):
            if hasattr(os, "posix_fallocate"):  # a disk that runs full under a memory map kills the process
                with (staging / name).open("rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        model = teacher()
        device = next(model.read_out.model.parameters()).device
        with progress.task(f"the teacher's {k} likeliest tokens", len(ids_NT)) as task:
            for start in range(0, len(ids_NT), batch):
                part = slice(start, min(start + batch, len(ids_NT)))
                mask_BT = None if mask_NT is None else mask_NT[part].to(device)
                found = _likeliest(model, ids_NT[part].to(device), mask_BT, k, temperature)
                log_p[part] = found[0].reshape(-1, *shape[1:]).numpy()
                index[part] = found[1].reshape(-1, *shape[1:]).numpy()
                task.advance(part.stop - part.start)
        log_p.flush()
        index.flush()
        facts = {"k": k, "temperature": temperature, "sequences": shape[0], "seq_len": shape[1]}
        (staging / _SIGN).write_text(json.dumps(facts) + "\n", encoding="utf-8")


@torch.no_grad()
def _likeliest(
    teacher: Teacher, ids_BT: Tensor, mask_BT: Tensor | None, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    lesson = teacher.lesson(ids_BT, mask_BT, logits=True)
    assert lesson.rows is not None
    values, tokens = [], []
    for start in range(0, len(lesson.rows), _ROWS):
        log_p, index = top_k_of(teacher.read_out.head(lesson.rows[start : start + _ROWS]), k, temperature)
        values.append(log_p.cpu())
        tokens.append(index.to(torch.int32).cpu())
    log_p = torch.cat(values)
    if mask_BT is not None:
        log_p[~mask_BT.reshape(-1).cpu()] = 0.0
    if not bool(torch.isfinite(log_p).all()):
        raise UserError.of(
            where="the teacher's next-token probabilities",
            expected="finite numbers",
            found="NaN or infinity",
            remedy="The teacher overflows in this dtype; use bfloat16 or float32.",
        )
    return log_p, torch.cat(tokens)
