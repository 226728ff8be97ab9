"""`intarsia anatomy list` and `anatomy check`: which model families are known, and whether one is described rightly.

A family is checked on a small random model, whose layers are pruned, joined, built and loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from intarsia.architecture.families import Family, known_families, with_family_file
from intarsia.architecture.spec import PARTS, Architecture
from intarsia.commands.result import Result
from intarsia.disk import read_json
from intarsia.errors import UserError
from intarsia.flags import Flag
from intarsia.progress import current, quiet_transformers

if TYPE_CHECKING:
    from intarsia.activations.architecture_trials import Trial

_EXACT = 1e-4
"""Relative error of float32 arithmetic in another order, through a few layers."""
_LEAK = 3e-5
"""The same of sums over tokens that a later one must not change at all."""


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """One family."""

    title: str
    model_types: tuple[str, ...]
    # whether all pieces of a merged layer compute what they computed in their own layers
    exact: bool
    # what does not
    approximated: str
    # what cannot be merged at all
    never_merged: str | None


@dataclass(frozen=True, kw_only=True)
class Families(Result):
    """Every known family."""

    families: tuple[FamilyRow, ...]


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One check of a family."""

    check: str
    # `ok`, `approximated` (as the family declares) or `failed`
    result: str
    # relative; None if it was not measured
    error: float | None
    note: str


@dataclass(frozen=True, kw_only=True)
class FamilyCheck(Result):
    """What came of every check."""

    source: str
    family: str
    model_type: str
    kinds_of_layers: str
    # whether no check failed
    passed: bool
    checks: tuple[CheckRow, ...]
    approximations: str | None


FamilyFile: TypeAlias = Annotated[
    Path | None, Flag(metavar="FILE.toml", help="A family file of your own; it is tried before the others.")
]


def families(*, family_file: FamilyFile = None) -> Families:
    """List every known family: its model types, what is exact when layers are merged, and what is approximated.

    Raises:
        UserError: the file is no family file.
    """
    with with_family_file(family_file):
        return Families(families=tuple(_family_row(family) for _, family in sorted(known_families().items())))


def _family_row(family: Family) -> FamilyRow:
    mixed = any((entry.field == "layer_types" and entry.every) or entry.kinds for entry in family.per_layer)
    return FamilyRow(
        title=family.title,
        model_types=family.model_types,
        exact=not family.approximations,
        approximated="; ".join(family.approximations),
        never_merged="layers that attend in different ways" if mixed else None,
    )


def check_family(
    source: Annotated[
        str,
        Flag(
            positional=True,
            metavar="CONFIG|FOLDER",
            help="A config.json, a folder with one, a hub id, or `demo`. Weights are not needed.",
        ),
    ],
    *,
    family_file: FamilyFile = None,
) -> FamilyCheck:
    """Check a family on a small random model with the features of a config; exit code 1 if a check fails.

    Raises:
        UserError: there is no config, no family for it, or it has a feature that the family does not cover.
    """
    import torch

    from intarsia.checkpoint.reader import architecture_of

    with (
        quiet_transformers(),
        with_family_file(family_file),
        tempfile.TemporaryDirectory(prefix="intarsia-anatomy-") as folder,
        torch.no_grad(),
    ):
        config = _config(source)
        large = architecture_of(config, where=source)
        with current().task("checking", 8) as task:
            rows = []
            for row in check_rows(large, Path(folder)):
                rows.append(row)
                task.advance()
        return FamilyCheck(
            source=source,
            family=large.family.title,
            model_type=str(config.get("model_type")),
            kinds_of_layers=", ".join(dict.fromkeys(large.layer_types or ("one",))),
            passed=all(row.result != "failed" for row in rows),
            checks=tuple(rows),
            approximations="; ".join(large.approximations) or None,
        )


def check_rows(large: Architecture, folder: Path) -> Iterator[CheckRow]:
    """Every check of a family, on a small model like `large`; files go into `folder`."""
    import torch

    from intarsia.activations import architecture_trials as trials
    from intarsia.building.loaded_model import LoadedModel
    from intarsia.building.tiny_model import shrunken, small_model
    from intarsia.checkpoint.reader import Checkpoint

    small_model(shrunken(large)).save_pretrained(folder / "small")
    try:
        checkpoint = Checkpoint.open(folder / "small", model="small")
    except UserError as error:
        first, *more = error.problems
        note = f"{first}{f' And {len(more)} more like this.' if more else ''}".replace(str(folder), "")
        yield CheckRow(check="tensors", result="failed", error=None, note=note.removeprefix("/small: "))
        return
    small = checkpoint.architecture
    note = f"{len(small.layer_shapes())} in a layer, of the expected shapes"
    yield CheckRow(check="tensors", result="ok", error=None, note=note)
    try:
        trial = trials.Trial.of(LoadedModel(checkpoint, device=torch.device("cpu")))
    except Exception as error:  # as below
        yield _broken("parity", error)
        return
    if small.removal_only:
        yield from _removal_rows(trial, folder)
        return
    kinds = small.layer_types or ("",) * small.n_layers
    # Two neighbours of one kind may be merged.
    first_of_two = next(index for index in range(small.n_layers - 1) if kinds[index] == kinds[index + 1])
    same, approximated = (first_of_two, first_of_two + 1), bool(small.approximations)

    yield _row("parity", "layer by layer is the model's own forward", partial(trials.parity, trial))
    for kind in dict.fromkeys(kinds):
        note = f"pieces of a layer ({kind}) in another order, norms folded" if kind else "pieces in another order"
        yield _row("pieces", note, partial(trials.order, trial, kinds.index(kind)))
    yield _row("ratio [1, 0]", "is dropping the second layer", partial(trials.everything_and_nothing, trial, same))
    for part in PARTS:
        if not small.is_mixture(part):
            work = partial(trials.own_inputs, trial, part, same)
            yield _row(f"merge, {part}", "pieces of two layers compute what they did", work, approximated=approximated)
    yield from _round_trip(partial(trials.round_trip, trial, same, folder / "built"))


def _removal_rows(trial: Trial, folder: Path) -> Iterator[CheckRow]:
    """Where no family file describes the layers: removing some is skipping them."""
    from intarsia.activations import architecture_trials as trials
    from intarsia.inspection.structure import problem_of, removals

    yield _row("parity", "layer by layer is the model's own forward", partial(trials.loop_parity, trial))
    yield _row("causal", "no token reads a later one", partial(trials.foresight, trial), least=_LEAK)
    found, whole = removals(trial.architecture), range(trial.architecture.n_layers)
    if not found:
        reason = problem_of(trial.architecture, [layer for layer in whole if layer != len(whole) // 2])
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
    else:
        yield from (_judged(*notes[key], value) for key, value in found.items())


def _row(
    check: str, note: str, work: Callable[[], float], *, approximated: bool = False, least: float = _EXACT
) -> CheckRow:
    try:
        return _judged(check, note, work() * _EXACT / least, approximated=approximated)
    except Exception as error:  # whatever breaks here is what the user wants to see in the table
        return _broken(check, error)


def _judged(check: str, note: str, error: float, *, approximated: bool = False) -> CheckRow:
    result = "ok" if error < _EXACT else "approximated" if approximated else "failed"
    return CheckRow(check=check, result=result, error=error if error < float("inf") else None, note=note)


def _broken(check: str, error: Exception) -> CheckRow:
    words = " ".join(str(error).split())[:300]
    return CheckRow(check=check, result="failed", error=None, note=f"{type(error).__name__}: {words}")


def _config(source: str) -> dict[str, Any]:
    from intarsia.checkpoint.files import read_config
    from intarsia.checkpoint.multimodal import NESTED, is_wrapped
    from intarsia.checkpoint.resolve import resolve

    path = Path(source)
    if path.is_file() and path.suffix == ".json":
        remedy = "Get the model's config again."
        config = read_json(path, expected="a config.json: one JSON object", remedy=remedy)
    else:
        config = read_config(path if path.is_dir() else resolve(source), quantised=True)
    return dict(config[NESTED]) if is_wrapped(config) else config
