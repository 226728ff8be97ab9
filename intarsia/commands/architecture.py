"""`intarsia anatomy list` and `anatomy check`: which model families are known, and whether one is described rightly.

The check builds a small random model with a config of its kind, prunes and joins its layers, and loads what is built.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch

from intarsia.activations import architecture_trials as trials
from intarsia.architecture.detect import detect
from intarsia.architecture.families import Family, known_families, with_family_file
from intarsia.architecture.spec import PARTS, Architecture
from intarsia.building.loaded_model import Resident
from intarsia.building.tiny_model import shrunken, small_model
from intarsia.checkpoint.files import read_config
from intarsia.checkpoint.multimodal import NESTED, is_wrapped
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import resolve
from intarsia.disk import read_json
from intarsia.errors import UserError
from intarsia.flags import Flag
from intarsia.progress import current

_EXACT = 1e-4
"""Relative error of float32 arithmetic in another order, through a few layers."""


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """One family."""

    title: str
    model_types: tuple[str, ...]
    # whether all pieces of a merged layer compute what they computed in their own layers
    exact: bool
    # what does not
    approximated: tuple[str, ...]
    # what cannot be merged at all
    never_merged: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "approximated": "; ".join(self.approximated)}


@dataclass(frozen=True, kw_only=True)
class Families:
    """Every known family."""

    families: tuple[FamilyRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"families": [row.to_dict() for row in self.families]}


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
class FamilyCheck:
    """What came of every check."""

    source: str
    family: str
    model_type: str
    kinds_of_layers: str
    # whether no check failed
    passed: bool
    checks: tuple[CheckRow, ...]
    approximations: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        declared = "; ".join(self.approximations) or None
        return {**asdict(self), "checks": [asdict(row) for row in self.checks], "approximations": declared}


FamilyFile: TypeAlias = Annotated[
    Path | None, Flag(metavar="FILE.toml", help="A family that is not in the package yet; it goes before the others.")
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
        approximated=family.approximations,
        never_merged="layers that attend in different ways" if mixed else None,
    )


def check_family(
    source: Annotated[
        str,
        Flag(
            positional=True,
            metavar="CONFIG_OR_FOLDER",
            help="A config.json or a folder with one (a hub id or `demo` will do). Weights are not needed.",
        ),
    ],
    *,
    family_file: FamilyFile = None,
) -> FamilyCheck:
    """Check a family on a small random model with the features of a config; exit code 1 if a check fails.

    Raises:
        UserError: there is no config, no family for it, or it has a feature that the family does not cover.
    """
    with with_family_file(family_file), tempfile.TemporaryDirectory(prefix="intarsia-anatomy-") as folder:
        config = _config(source)
        large = detect(config, where=source)
        with current().task("checking", 8) as task, torch.no_grad():
            rows = []
            for row in _rows(large, Path(folder)):
                rows.append(row)
                task.advance()
        return FamilyCheck(
            source=source,
            family=large.family.title,
            model_type=str(config.get("model_type")),
            kinds_of_layers=", ".join(dict.fromkeys(large.layer_types or ("one",))),
            passed=all(row.result != "failed" for row in rows),
            checks=tuple(rows),
            approximations=large.approximations,
        )


def _config(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_file() and path.suffix == ".json":
        remedy = "Get the model's config again."
        config = read_json(path, expected="a config.json: one JSON object", remedy=remedy)
    else:
        config = read_config(path if path.is_dir() else resolve(source), quantised=True)
    return dict(config[NESTED]) if is_wrapped(config) else config


def _rows(large: Architecture, folder: Path) -> Iterator[CheckRow]:
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
    resident = Resident(checkpoint, device=torch.device("cpu"))
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
