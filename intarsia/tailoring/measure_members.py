"""What is measured of the members of a family before a search: sensitivities of pieces, and statistics for blends.

A member is loaded once, and goes over the text once for all of it; one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.checkpoint.reader import Checkpoint
from intarsia.planning.intermediate import Intermediate
from intarsia.progress import Progress
from intarsia.recipe.recipe import Variant, identity
from intarsia.tailoring import sensitivities
from intarsia.tailoring.blend_methods import Statistic
from intarsia.tailoring.measure_statistics import write_statistics
from intarsia.tailoring.sensitivities import Scores


def measure_members(
    members: Mapping[str, Checkpoint],
    corpus: Corpus,
    *,
    scores: Path | None,
    statistics: Path,
    kinds: Sequence[Statistic],
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
) -> None:
    """Write what is asked for and not there yet.

    Args:
        scores: the file of the sensitivities of all members; None where nothing asks for them.
        statistics: a folder, in which each member has one of its own, whole or not at all.
        kinds: which statistics.

    Raises:
        UserError: activations or gradients are not finite, or the disk is full.
    """
    scored = scores is not None and not scores.exists()
    found: Scores = {}
    with progress.task("measuring the members", len(members)) as task:
        for name, checkpoint in members.items():
            task.note(name)
            gathered = bool(kinds) and not (statistics / name).exists()
            if scored or gathered:
                resident = Resident(checkpoint, device=device, dtype=dtype)
                whole = identity(Variant(name=name, model=checkpoint.model), checkpoint.anatomy.n_layers)
                model = Intermediate(resident, corpus, whole.layers, progress=progress)
                try:
                    model.measure()
                    if scored:
                        found |= sensitivities.scores_of(model, name)
                    if gathered:
                        write_statistics(model, name, kinds, statistics)
                finally:
                    model.close()
            task.advance()
    if scores is not None and scored:
        sensitivities.save(found, scores)
