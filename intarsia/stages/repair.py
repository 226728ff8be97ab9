"""The closed form as a part of `compress`: fitted on the calibration text, judged, and kept in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from intarsia.calibration.corpus import Corpus
from intarsia.disk import full_disk_named
from intarsia.evaluation.chain import Chain
from intarsia.evaluation.perplexity import perplexity
from intarsia.healing.closed_form import ClosedFormSettings, fit
from intarsia.healing.original import Original
from intarsia.planning.run_folder import RunFolder
from intarsia.recipe import codec
from intarsia.recipe.recipe import Recipe
from intarsia.stages.calibration_text import pin_text
from intarsia.stages.source import Source

HEALS = ("closed-form", "none")
_FOLDER = "healed"


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A healed recipe and what came of it.

    `taken` is False where the fit raised the loss of the held-out calibration text: the recipe is then as it was.
    `path`: where it is kept. `fresh`: it was fitted now, not found there.
    """

    recipe: Recipe
    path: Path
    fresh: bool
    taken: bool
    read_outs: int
    tokens: int


def repaired(
    run: Path,
    recipe: Recipe,
    source: Source,
    *,
    settings: ClosedFormSettings,
    batch_tokens: int | None,
    original: Original | None = None,
) -> Repaired:
    """A recipe of a run's ladder, healed in closed form on the run's calibration text.

    A fit that is finished is in the run folder, and is only read.

    Args:
        original: its hidden states on the source's text, shared with other fits.

    Raises:
        UserError: activations are not finite, or the calibration text is not the one of the run.
    """
    facts = {"recipe": codec.content_hash(recipe), "settings": asdict(settings), "batch_tokens": batch_tokens}
    # Text, dtype and device are the run's own: it refuses others.
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    kept = run / _FOLDER / f"layers-{len(recipe.layers):03d}-{key}.yaml"
    if kept.exists():
        source.progress.say(f"{kept}: healed already")
        return _result(codec.load(kept), kept, fresh=False)
    corpus = source.corpus
    pin_text(RunFolder.existing(run), corpus)
    fitted, fits = fit(
        recipe,
        source.resident,
        corpus,
        settings=settings,
        original=original,
        batch_tokens=batch_tokens,
        room=source.placement.room(run),
        progress=source.progress,
    )
    judged = _held_out(corpus, settings)
    before, after = (
        perplexity(
            Chain(each, source.resident, room=source.placement.room(run)), judged, progress=source.progress
        ).value
        for each in (recipe, fitted)
    )
    taken = after < before
    found = f"held-out perplexity {before:.2f} -> {after:.2f}"
    source.progress.say(f"closed form: {found}" + ("" if taken else "; no better, so the model stays as it was cut"))
    text = {"description": corpus.description, "tokens": corpus.tokens, "sha256": corpus.sha256}
    heal = {
        "settings": {"closed-form": asdict(settings)},
        "text": text,
        "stages": [
            {"stage": "cut", "held_out_perplexity": before},
            {"stage": "closed-form", "held_out_perplexity": after, "taken": taken},
        ],
        "read_outs": fits,
    }
    done = replace(fitted if taken else recipe, provenance={**recipe.provenance, "heal": heal})
    with full_disk_named(run):
        kept.parent.mkdir(exist_ok=True)
        codec.save(done, kept)
    return _result(done, kept, fresh=True)


def _held_out(corpus: Corpus, settings: ClosedFormSettings) -> Corpus:
    """The sequences that nothing was fitted on: they have only chosen the strength."""
    rows = slice(0, None, settings.held_out)
    mask = None if corpus.mask is None else corpus.mask[rows]
    return Corpus.of(corpus.input_ids[rows], mask=mask, description="held-out calibration text", documents=1)


def _result(recipe: Recipe, path: Path, *, fresh: bool) -> Repaired:
    heal: Mapping[str, Any] = recipe.provenance["heal"]
    return Repaired(
        recipe=recipe,
        path=path,
        fresh=fresh,
        taken=heal["stages"][-1]["taken"],
        read_outs=sum(row["ridge"] is not None for row in heal["read_outs"]),
        tokens=heal["text"]["tokens"],
    )
