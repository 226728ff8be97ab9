"""The checks of a family on a small random model, whose layers are pruned, joined, built and loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
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
from intarsia.inspection.structure import problem_of, quiet
from intarsia.progress import current

_EXACT = 1e-4
"""Relative error of float32 arithmetic in another order, through a few layers."""

_LEAK = 3e-5
"""The same of sums over tokens that a later one must not change at all."""


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
    try:
        trial = trials.Trial.of(resident)
    except Exception as error:  # whatever breaks here is what the user wants to see in the table
        yield _broken("parity", error)
        return
    if checkpoint.architecture.removal_only:
        yield from _removal_rows(trial, folder)
        return
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


@torch.no_grad()
def verified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, where a small model of its kind passes every check; layers that can only be removed are checked
    before work.

    Raises:
        UserError: a check fails.
    """
    architecture = checkpoint.architecture
    if architecture.inspected is None or architecture.inspected.writers is not None:
        return checkpoint
    with quiet(), tempfile.TemporaryDirectory(prefix="intarsia-check-") as folder:
        failed = [row for row in check_rows(architecture, Path(folder)) if row.result == "failed"]
        if failed:
            raise UserError(
                f"Layers of {checkpoint.model} cannot be removed: on a small model of its kind, "
                + "; ".join(f"{row.check} fails ({row.note})" for row in failed[:2])
                + ".",
                f"`intarsia anatomy check {checkpoint.folder / 'config.json'}` shows every check. Use another model.",
            )
        small = Checkpoint.open(Path(folder) / "small", model="small")
        trial = trials.Trial.of(LoadedModel(small, device=torch.device("cpu")))
        found, without = known_writers(trial)
    if without:
        current().say(
            f"closed form: no output projection is recognised in {', '.join(without)}; these layers stay as they are"
        )
    return replace(
        checkpoint, architecture=replace(architecture, inspected=replace(architecture.inspected, writers=found))
    )


def known_writers(trial: trials.Trial) -> tuple[dict[str, float], list[str]]:
    """The modules that write to the residual stream, and the kinds of layers in which there is none."""
    architecture, found, wrong, without = trial.architecture, dict[str, float](), set[str](), []
    assert architecture.inspected is not None
    in_files = {parameter for parameter, _ in architecture.inspected.rows.values()}
    for kind, layer in _one_of_each(architecture).items():
        own = {name: scale for name, scale in trials.writers(trial, layer).items() if f"{name}.weight" in in_files}
        names = {name for name, _ in trial.resident.layers[layer].named_modules()}
        wrong |= {name for name in found if name in names and abs(own.get(name, 0.0) - found[name]) > _EXACT}
        found |= own
        if not own:
            without.append(kind or "its layers")
    return {name: scale for name, scale in found.items() if name not in wrong}, without


def removals(architecture: Architecture) -> list[list[int]]:
    """Layers of a model that may stay by themselves: without one of the first, and without two of the others."""
    whole = list(range(architecture.n_layers))

    def without(layers: list[int], order: Iterable[int]) -> list[int]:
        kinds = architecture.layer_types or ("",) * architecture.n_layers
        for dropped in order:
            left = [layer for layer in layers if layer != dropped]
            if len({kinds[layer] for layer in left}) == len(set(kinds)) and problem_of(architecture, left) is None:
                return left
        return layers

    one = without(whole, whole)
    middle = len(whole) // 2
    two = without(without(whole, [*whole[middle:], *whole[:middle]]), reversed(whole))
    return [kept for kept in (one, two) if kept != whole]


def _removal_rows(trial: trials.Trial, folder: Path) -> Iterator[CheckRow]:
    yield _row("parity", "layer by layer is the model's own forward", partial(trials.loop_parity, trial))
    yield _row("causal", "no token reads a later one", partial(trials.foresight, trial), least=_LEAK)
    found = removals(trial.architecture)
    if not found:
        whole = range(trial.architecture.n_layers)
        reason = problem_of(trial.architecture, [layer for layer in whole if layer != whole[len(whole) // 2]])
        note = f"no layer can go: {reason or 'each is the last of its kind'}"
        yield CheckRow(check="removal", result="failed", error=None, note=note)
    for number, kept in enumerate(found):
        yield from _round_trip(partial(trials.removal, trial, kept, folder / f"built-{number}"))
    yield _row("streaming", "layers read one by one give what the model gives", partial(trials.streamed, trial))


def _round_trip(work: Callable[[], Mapping[str, float]]) -> Iterator[CheckRow]:
    notes = {
        "removal": ("removal", "a model without layers is the original in which they are skipped"),
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


def _row(
    check: str, note: str, work: Callable[[], float], *, declared: bool = False, least: float = _EXACT
) -> CheckRow:
    try:
        return _judged(check, note, work() * _EXACT / least, declared=declared)
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
