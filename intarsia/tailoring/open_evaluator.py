"""From a family and its family.yaml to an evaluator: objectives read, the base loaded and measured."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

from intarsia.building.resident import default_device
from intarsia.building.spread import free_bytes
from intarsia.evaluation.requests import positions_of
from intarsia.evaluation.run_rows import default_batch_tokens, takes_packed_rows
from intarsia.progress import Progress, Silent
from intarsia.tailoring.evaluator import Evaluator
from intarsia.tailoring.example_sources import read_objectives
from intarsia.tailoring.family import Family
from intarsia.tailoring.family_file import FamilyFile
from intarsia.tailoring.kept_fits import KeptFits
from intarsia.tailoring.objective import QUESTIONS, Objective, check_budgets, cuts_of
from intarsia.tailoring.resident_family import ResidentFamily
from intarsia.tailoring.trial_repair import repair_corpus, repair_windows

_SEQ_LEN = 128  # a window of text is then about as much work as a question with its choices
_SHARE_OF_FREE = 0.3  # of memory, for caches
_MOST_ON_CPU = 2**30
_GPU_LOGITS = 2**30


def open_evaluator(
    family: Family,
    spec: FamilyFile,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
    seq_len: int = _SEQ_LEN,
    tokenizer: Any | None = None,
    probe: bool = True,
    fits: KeptFits | None = None,
    progress: Progress | None = None,
) -> Evaluator:
    """Read the objectives, load the base, and measure it.

    Args:
        family: opened with weights.
        spec: the family file.
        device, dtype: where and in what to run; None for the best device and the checkpoint's dtype.
        memory_bytes: for caches (layers that were made, and states behind shared first layers), beside the family's
            own tensors; None for 1 GiB on the CPU, and for three tenths of what is free elsewhere.
        seq_len: tokens of a window of text.
        tokenizer: the base's; None to read it from its folder.
        probe: measure the base at the largest budget, and refuse objectives that tell nothing. One of several
            workers is enough for that.
        fits: where what is fitted for trials is kept.

    Raises:
        UserError: with everything that is wrong with the objectives; a budget is larger than the data; an objective
            tells nothing.
    """
    progress = progress or Silent()
    device = device or default_device()
    checkpoint = family.checkpoints()[family.names[0]]
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    search = spec.search
    positions = positions_of(SimpleNamespace(**checkpoint.config))
    seq_len = min(seq_len, positions or seq_len)
    objectives = read_objectives(
        spec.objectives,
        tokenizer,
        windows=search.max_budget + (repair_windows(seq_len) if spec.heal != "none" else 0),
        seq_len=seq_len,
        max_length=positions,
        seed=search.seed,
        progress=progress,
    )
    check_budgets(objectives, search.max_budget)
    repair_on = None
    if spec.heal != "none":
        repair_on = repair_corpus(objectives, seq_len=seq_len, eos=tokenizer.eos_token_id)
    with progress.task("loading the base", total=1) as task:
        room = _cache_bytes(device) if memory_bytes is None else memory_bytes
        layers = ResidentFamily(family, device=device, dtype=dtype, memory_bytes=room // 3)
        task.advance()
    made = Evaluator(
        layers,
        objectives,
        cuts=cuts_of(search.min_budget, search.max_budget, search.eta),
        pack=takes_packed_rows(layers.resident.model, _longest_row(objectives)),
        batch_tokens=_batch_tokens(layers),
        cache_bytes=room * 2 // 3,
        repair_on=repair_on,
        fits=fits,
    )
    if probe:
        with progress.task("measuring the base", total=1) as task:
            made.probe(search.max_budget)
            task.advance()
    return made


def _cache_bytes(device: torch.device) -> int:
    """A share of what is free, on the CPU no more than 1 GiB."""
    room = int(free_bytes(device) * _SHARE_OF_FREE)
    return room if device.type == "cuda" else min(_MOST_ON_CPU, room)


def _longest_row(objectives: Sequence[Objective]) -> int:
    """The longest row of a question with one of its choices, in tokens."""
    lengths = (
        len(request.context) + len(request.continuation)
        for objective in objectives
        if objective.measure in QUESTIONS
        for example in objective.examples
        for request in example.requests
    )
    return max(lengths, default=0)


def _batch_tokens(layers: ResidentFamily) -> int:
    """As for evaluation; on a GPU so few that the logits of a batch stay within 1 GiB."""
    resident = layers.resident
    usual = default_batch_tokens(resident.device)
    if resident.device.type == "cpu":
        return usual
    return max(1, min(usual, _GPU_LOGITS // (resident.architecture.vocabulary * resident.model.dtype.itemsize)))
