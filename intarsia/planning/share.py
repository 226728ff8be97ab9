"""One worker's share of the calibration set: it runs the model on its own sequences, and tells sums and losses.

A worker opens the model once and keeps its hidden states, as planning in one process does. What it is asked comes with
the layers that the model has by then, so a share that was lost with its worker is measured anew by whichever takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.stats import LayerMeasure
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError
from intarsia.evaluation.memory import peak_memory_bytes
from intarsia.planning import measuring
from intarsia.planning.candidates import Change, losses_of, normed_with
from intarsia.planning.intermediate import Intermediate
from intarsia.recipe.ops import Op

_LOCK = threading.Lock()
_RESIDENTS: dict[str, Resident] = {}
"""The model that this process has opened, by the work that it is for."""

_MODELS: dict[tuple[str, int], Intermediate] = {}
"""What this process has measured, by work and share."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a worker needs to measure some sequences; can be sent to it.

    Attributes:
        sha256: of the weights: a worker that finds others under the model's name refuses them.
        number: which share this is.
        folder: for hidden states that do not fit, where the worker has such a folder.
        ids_NT, mask_NT: its sequences.
    """

    model: str
    revision: str | None
    sha256: str
    device: str
    dtype: torch.dtype | None
    stream: bool
    memory_bytes: int | None
    folder: Path | None
    batch_tokens: int | None
    behind_final_norm: bool
    number: int
    ids_NT: Tensor
    mask_NT: Tensor | None

    def resident(self) -> Resident:
        """The model.

        Raises:
            UserError: it is not here, or is another one.
        """
        checkpoint = open_checkpoint(self.model, revision=self.revision)
        found = scan(checkpoint)
        if found != self.sha256:
            raise UserError.of(
                where=f"{self.model}, on a worker",
                expected=f"the weights that are planned with (sha256 {self.sha256[:12]}...)",
                found=f"others (sha256 {found[:12]}...)",
                remedy="Give the model by a path, or a hub id with a --revision, that means the same to all workers.",
            )
        device = torch.device(self.device)
        if self.device == "cuda":
            device = torch.device("cuda", self.number % torch.cuda.device_count())
        return Resident(checkpoint, device=device, dtype=self.dtype, stream=self.stream)

    def intermediate(self, resident: Resident, ops: Sequence[Op]) -> Intermediate:
        """The model with these layers on its sequences; nothing is run yet."""
        corpus = Corpus.of(self.ids_NT, mask=self.mask_NT, description="a share of the calibration text", documents=1)
        return Intermediate(
            resident,
            corpus,
            ops,
            batch_tokens=self.batch_tokens,
            memory_bytes=self.memory_bytes,
            folder=self.folder if self.folder is not None and self.folder.is_dir() else None,
            behind_final_norm=self.behind_final_norm,
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a worker has found, the layer-forwards that this took times sequences, what memory it needs, and where."""

    found: Any
    spent: float
    peak_memory_bytes: int
    worker: str


def work(key: str, share: Share, ops: Sequence[Op], question: str, given: Sequence[Any]) -> Answer:
    """Answer a question about the model that has these layers; runs in a worker.

    Raises:
        UserError: the model is not here, activations are not finite, or memory does not suffice.
    """
    from distributed import get_worker

    with _LOCK:
        model = _opened(key, share, ops)
        before = model.layer_forwards
        model.refresh()
        found = _QUESTIONS[question](model, *given)
        spent = (model.layer_forwards - before) * len(model.corpus)
        worker = str(get_worker().address)
        return Answer(found=found, spent=spent, peak_memory_bytes=peak_memory_bytes(), worker=worker)


def forget(key: str) -> None:
    """Let go of everything that belongs to a piece of work; runs in a worker."""
    with _LOCK:
        for name in [name for name in _MODELS if name[0] == key]:
            _MODELS.pop(name).close()
        _RESIDENTS.pop(key, None)


def _opened(key: str, share: Share, ops: Sequence[Op]) -> Intermediate:
    if key not in _RESIDENTS:
        _RESIDENTS[key] = share.resident()
    model = _MODELS.get((key, share.number))
    if model is None:
        model = _MODELS[key, share.number] = share.intermediate(_RESIDENTS[key], ops)
    elif model.ops != list(ops):
        model.become(ops)
    return model


def _measured(model: Intermediate) -> tuple[list[LayerMeasure], Tensor, Tensor]:
    return model.measures, model.losses_N, model.counts_N


def _distance(
    model: Intermediate, start: int, count: int, tokens: Literal["all-tokens", "last-token"]
) -> tuple[float, int]:
    with torch.inference_mode():
        return measuring.distances(model, start, count, tokens)


def _losses(model: Intermediate, changes: Sequence[Change], sequences: slice) -> list[Tensor]:
    return list(losses_of(model, changes, sequences=sequences))


def _normed(model: Intermediate, change: Change, sequences: slice) -> Tensor:
    return normed_with(model, change.start, change.count, change.ops, sequences=sequences)


_QUESTIONS: Mapping[str, Callable[..., Any]] = {
    "measured": _measured,
    "distance": _distance,
    "tokens": Intermediate.tokens_at,
    "losses": _losses,
    "normed": _normed,
}
