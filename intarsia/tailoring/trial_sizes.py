"""How much a trial may take: memory for caches, and tokens at once."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from intarsia.evaluation.run_rows import default_batch_tokens
from intarsia.tailoring.objective import QUESTIONS, Objective
from intarsia.tailoring.resident_family import ResidentFamily

_CPU_CACHE = 2**30
_SHARE_OF_FREE_MEMORY = 0.3
_GPU_LOGITS = 2**30


def cache_bytes_of(device: torch.device, asked: int | None) -> int:
    """For caches beside a family's own tensors: what is asked for, or a share of what is free, 1 GiB on the CPU at
    most."""
    if asked is not None:
        return asked
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE_MEMORY)
    return min(_CPU_CACHE, int(psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY))


def longest_row(objectives: Sequence[Objective]) -> int:
    """The longest row of a question with one of its choices, in tokens."""
    lengths = (
        len(request.context) + len(request.continuation)
        for objective in objectives
        if objective.measure in QUESTIONS
        for example in objective.examples
        for request in example.requests
    )
    return max(lengths, default=0)


def batch_tokens_of(layers: ResidentFamily) -> int:
    """As for judging, but elsewhere than on the CPU so few that the logits of windows stay within bounds."""
    resident = layers.resident
    usual = default_batch_tokens(resident.device)
    if resident.device.type == "cpu":
        return usual
    return max(1, min(usual, _GPU_LOGITS // (resident.anatomy.vocabulary * resident.model.dtype.itemsize)))


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory does not suffice."""
    text = str(error)
    wide = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return wide or "out of memory" in text or "can't allocate memory" in text
