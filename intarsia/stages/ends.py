"""Closed-form fits from several beginnings, each kept in a folder until the best is known: what was killed goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from intarsia.building.resident import Resident
from intarsia.calibration.batches import Batches
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.room import Room
from intarsia.disk import full_disk_named
from intarsia.healing.closed_form import fit
from intarsia.healing.closed_form_settings import ClosedFormSettings
from intarsia.healing.original import Original, kept_whole
from intarsia.healing.starts import End, Start, best_end, held_out_perplexity
from intarsia.progress import Progress
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe


def best_fit(
    beginnings: Sequence[Start],
    resident: Resident,
    corpus: Corpus,
    held_out: Corpus,
    *,
    settings: ClosedFormSettings,
    folder: Path,
    original: Original | None = None,
    batch_tokens: int | None = None,
    room: Room,
    progress: Progress,
) -> End:
    """`best_end` of the closed form. Several fits share what the original makes of the text, where memory has room for
    it, and each is read from the folder where it is finished; `forget` clears that away.

    Args:
        corpus: to fit on; `held_out` to judge by.
        original: its hidden states on the corpus, shared with yet other fits.

    Raises:
        UserError: activations are not finite, or the disk is full.
    """
    several = len(beginnings) > 1
    shared: Original | None = None
    if several and original is None:
        batches = Batches(corpus, resident.device, batch_tokens=batch_tokens, progress=progress)
        original = shared = kept_whole(resident, batches, room=room, progress=progress)

    def fitted(start: Recipe) -> tuple[Recipe, list[dict[str, Any]]]:
        path = folder / f"{schema.content_hash(start)[:16]}.yaml"
        if several and path.exists():
            found = schema.load(path)
            return found, found.provenance["read_outs"]
        found, fits = fit(
            start,
            resident,
            corpus,
            settings=settings,
            original=original,
            batch_tokens=batch_tokens,
            room=room,
            progress=progress,
        )
        if several:
            with full_disk_named(folder):
                folder.mkdir(parents=True, exist_ok=True)
                schema.save(replace(found, provenance={"read_outs": fits}), path)
        return found, fits

    def judged(found: Recipe) -> float:
        return held_out_perplexity(resident, held_out, found, room=room, progress=progress)

    try:
        end = best_end(beginnings, fitted, judged)
    finally:
        if shared is not None:
            shared.close()
    if several:
        progress.say(f"closed form: {end.told()}")
    return end


def forget(folder: Path) -> None:
    """Delete the fits that were kept."""
    shutil.rmtree(folder, ignore_errors=True)
