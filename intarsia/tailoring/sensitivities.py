"""How sensitive each piece of each layer of each member is: what a concatenation in the search chooses pieces by.

Measured once for each member on the same text, as CoMe does (`intarsia.planning.scores`), and kept in the run folder:
with it any trial of the log becomes a recipe again, without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from intarsia.architecture.spec import PARTS, Part
from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.checkpoint.reader import Checkpoint
from intarsia.disk import full_disk_named
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.scores import part_scores
from intarsia.progress import Progress
from intarsia.recipe.ops import LayerRef
from intarsia.recipe.recipe import Variant, identity
from intarsia.tailoring.translate import PieceScores

Scores = dict[LayerRef, dict[Part, Tensor]]


def measure(
    members: Mapping[str, Checkpoint],
    corpus: Corpus,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Scores:
    """The scores of every layer of every member; one model is in memory at a time.

    Raises:
        UserError: activations are not finite.
    """
    found: Scores = {}
    with progress.task("measuring the members", len(members)) as task:
        for name, checkpoint in members.items():
            task.note(name)
            resident = Resident(checkpoint, device=device, dtype=dtype)
            whole = identity(Variant(name=name, model=checkpoint.model), checkpoint.architecture.n_layers)
            model = Intermediate(resident, corpus, whole.layers, progress=progress)
            try:
                model.measure()
                for layer, (measured, module) in enumerate(zip(model.measures, model.modules, strict=True)):
                    found[LayerRef(variant=name, layer=layer)] = {
                        part: part_scores(measured.channels[part], module, model.architecture, part).cpu()
                        for part in PARTS
                    }
            finally:
                model.close()
            task.advance()
    return found


def save(scores: PieceScores, path: Path) -> None:
    """Write scores to a file that is there whole or not at all."""
    from safetensors.torch import save_file

    tensors = {
        f"{ref.variant}:{ref.layer}:{part}": tensor.contiguous()
        for ref, parts in scores.items()
        for part, tensor in parts.items()
    }
    staging = path.with_name(f".{path.name}")
    with full_disk_named(path.parent):
        save_file(tensors, staging)
        staging.replace(path)


def load(path: Path) -> Scores:
    """The scores in a file of `save`."""
    found: Scores = {}
    for name, tensor in load_file(path).items():
        variant, layer, part = name.rsplit(":", 2)
        scores = found.setdefault(LayerRef(variant=variant, layer=int(layer)), {})
        scores[next(known for known in PARTS if known == part)] = tensor
    return found
