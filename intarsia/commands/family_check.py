"""The checks of a family on a small random model, whose layers are pruned, joined, built and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from intarsia.activations import architecture_trials as trials
from intarsia.architecture.spec import PARTS, Architecture
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.tiny_model import shrunken, small_model
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.architecture import CheckRow
from intarsia.errors import UserError

_EXACT = 1e-4
"""Relative error of float32 arithmetic in another order, through a few layers."""


@torch.no_grad()
def check_rows(large: Architecture, folder: Path) -> Iterator[CheckRow]:
    """Every check of a family, on a small model like `large`; files go into `folder`."""
    config = shrunken(large)
    small_model(config).save_pretrained(folder / "small")
    try:
        checkpoint = Checkpoint.open(folder / "small", model="small")
    except UserError as error:
        first, *more = error.problems
        note = f"{first}{f' And {len(more)} more like this.' if more else ''}".replace(str(folder), "")
        yield CheckRow(check="tensors", result="failed", error=None, note=note.removeprefix("/small: "))
        return
    shapes = checkpoint.architecture.layer_shapes()
    yield CheckRow(check="tensors", result="ok", error=None, note=f"{len(shapes)} in a layer, of the expected shapes")
    resident = LoadedModel(checkpoint, device=torch.device("cpu"))
    trial = trials.Trial.of(resident)
    same = _same_kind(checkpoint.architecture)
    declared = bool(checkpoint.architecture.approximations)
    yield _row("parity", "layer by layer is the model's own forward", partial(trials.parity, trial))
    for kind, layer in _one_of_each(checkpoint.architecture).items():
        note = f"pieces of a layer ({kind}) in another order, norms folded" if kind else "pieces in another order"
        yield _row("pieces", note, partial(trials.order, trial, layer))
    yield _row("ratio [1, 0]", "is dropping the second layer", partial(trials.everything_and_nothing, trial, same))
    for part in PARTS:
        if not checkpoint.architecture.is_mixture(part):
            note = "pieces of two layers compute what they did"
            yield _row(f"merge, {part}", note, partial(trials.own_inputs, trial, part, same), declared=declared)
    yield from _round_trip(partial(trials.round_trip, trial, same, folder / "built"))


def _round_trip(work: Callable[[], Mapping[str, float]]) -> Iterator[CheckRow]:
    notes = {
        "logits": ("build and load", "a shallower model from disk is the one in memory"),
        "generation": ("generation", "with the cache as without"),
        "config": ("config", "its per-layer lists follow the layers"),
    }
    try:
        found = work()
    except Exception as error:  # whatever breaks here is what the user wants to see in the table
        yield _broken("build and load", error)
        return
    for key, value in found.items():
        check, note = notes[key]
        yield _judged(check, note, value, declared=False)


def _row(check: str, note: str, work: Callable[[], float], *, declared: bool = False) -> CheckRow:
    try:
        return _judged(check, note, work(), declared=declared)
    except Exception as error:  # whatever breaks here is what the user wants to see in the table
        return _broken(check, error)


def _judged(check: str, note: str, error: float, *, declared: bool) -> CheckRow:
    result = "ok" if error < _EXACT else "approximated" if declared else "failed"
    return CheckRow(check=check, result=result, error=error if error < float("inf") else None, note=note)


def _broken(check: str, error: Exception) -> CheckRow:
    words = " ".join(str(error).split())[:300]
    return CheckRow(check=check, result="failed", error=None, note=f"{type(error).__name__}: {words}")


def _one_of_each(architecture: Architecture) -> dict[str, int]:
    if architecture.layer_types is None:
        return {"": 0}
    return {kind: architecture.layer_types.index(kind) for kind in dict.fromkeys(architecture.layer_types)}


def _same_kind(architecture: Architecture) -> tuple[int, int]:
    """Two neighbours that may be merged."""
    types = architecture.layer_types
    first = next(
        index for index in range(architecture.n_layers - 1) if types is None or types[index] == types[index + 1]
    )
    return first, first + 1
