"""What comes before layers of a model without a family file are removed: every check, on a small model of its kind."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from intarsia.activations import architecture_trials as trials
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.anatomy import check_rows
from intarsia.errors import UserError
from intarsia.progress import current, quiet_transformers

_EQUAL = 1e-4


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
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="intarsia-check-") as folder:
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
        found, without = _known_writers(trial)
    if without:
        current().say(
            f"closed form: no output projection is recognised in {', '.join(without)}; these layers stay as they are"
        )
    return replace(
        checkpoint, architecture=replace(architecture, inspected=replace(architecture.inspected, writers=found))
    )


def _known_writers(trial: trials.Trial) -> tuple[dict[str, float], list[str]]:
    """The modules that write to the residual stream, and the kinds of layers in which there is none."""
    architecture, found, wrong, without = trial.architecture, dict[str, float](), set[str](), []
    assert architecture.inspected is not None
    in_files = {parameter for parameter, _ in architecture.inspected.rows.values()}
    kinds = architecture.layer_types or ("",) * architecture.n_layers
    for kind in dict.fromkeys(kinds):
        layer = kinds.index(kind)
        own = {name: scale for name, scale in trials.writers(trial, layer).items() if f"{name}.weight" in in_files}
        names = {name for name, _ in trial.resident.layers[layer].named_modules()}
        wrong |= {name for name in found if name in names and abs(own.get(name, 0.0) - found[name]) > _EQUAL}
        found |= own
        if not own:
            without.append(kind or "its layers")
    return {name: scale for name, scale in found.items() if name not in wrong}, without
