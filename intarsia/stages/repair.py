"""The closed form as a part of `compress`: fitted on the calibration text, judged, and kept in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from intarsia.activations.loop import Batches
from intarsia.architecture.spec import Architecture
from intarsia.commands.job import pin_text
from intarsia.data.corpus import Corpus
from intarsia.disk import full_disk_named
from intarsia.healing.fit_plan import fit_forwards, fit_passes_at_most
from intarsia.healing.restarts import AS_IT_IS, Start, best_fit, forget, held_out_perplexity, starts
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.teacher import TeacherStates, has_room
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.step import Planner
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, identity
from intarsia.stages.source import Source

HEALS = ("closed-form", "none")
LAST_BLOCKS = 2
"""Blocks of the original that are fitted over all layers beside the ladder's recipe, where blocks were tried."""

_FOLDER = "healed"


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A healed recipe and what came of it.

    `taken` is False where the fit raised the loss of the held-out calibration text: the recipe is then as it was.
    `path`: where it is kept. `fresh`: it was fitted now, not found there. `start`: which of several beginnings came to
    the least loss; None where there was one. `forwards`: layer-forwards over the text that all fits take.
    """

    recipe: Recipe
    path: Path
    fresh: bool
    taken: bool
    read_outs: int
    tokens: int
    start: str | None
    forwards: int

    @property
    def goes_on(self) -> bool:
        """Whether what was fitted on the way down is in the recipe."""
        return not self.taken or self.start in (None, AS_IT_IS)


def repaired(
    run: Path,
    recipe: Recipe,
    source: Source,
    *,
    settings: ClosedFormSettings,
    teacher: TeacherStates | None = None,
) -> Repaired:
    """A recipe of a run's ladder, healed in closed form on the run's calibration text.

    Of several starting points (see `beginnings`) the one is taken that ends with the lowest loss on text that nothing
    was fitted on or chosen by; and only if that is lower than without a fit. Where there is no more text, some
    sequences of the calibration text are kept out of the fit for it.
    A fit that is finished is in the run folder, and is only read; so is each of several, until the best is known.

    Args:
        teacher: the original's hidden states on the source's text, shared with other fits.

    Raises:
        UserError: activations are not finite, or the calibration text is not the one of the run.
    """
    folder = Ladder.existing(run)
    architecture = source.checkpoint.architecture
    begin = beginnings(folder, recipe, architecture)
    forwards = sum(fit_forwards(start.recipe, settings, architecture) for start in begin)
    facts: dict[str, Any] = {
        "recipe": schema.content_hash(recipe),
        "settings": asdict(settings),
        **({"starts": [start.name for start in begin]} if len(begin) > 1 else {}),
    }
    # Text, dtype and device are the run's own: it refuses others.
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    kept = run / _FOLDER / f"layers-{len(recipe.layers):03d}-{key}.yaml"
    ends = kept.with_suffix(".ends")
    if kept.exists():
        forget(ends)
        source.progress.say(f"{kept}: healed already")
        return _result(schema.load(kept), kept, forwards, fresh=False)
    corpus = source.corpus
    pin_text(folder.run, source)
    room, progress = source.placement.room(run), source.progress
    # A text that chose something (a step, a ridge strength) flatters what was chosen: another one must judge.
    held_out, unseen = source.text.selection, list[int]()
    if held_out is None:
        settings, held_out, unseen = _set_aside(corpus, settings)

    before = held_out_perplexity(source.resident, held_out, recipe, room=room, progress=progress)
    shared = teacher
    if teacher is None:
        batches = Batches(corpus, source.resident.device, batch_tokens=source.placement.batch_tokens, progress=progress)
        keep = len(begin) > 1 and has_room(source.resident, batches, room)
        shared = TeacherStates(source.resident, batches, keep=keep, room=room, progress=progress)
    assert shared is not None
    try:
        end = best_fit(
            begin, shared, held_out, settings=settings, folder=ends, unseen=unseen, room=room, progress=progress
        )
    finally:
        if teacher is None:
            shared.close()
    after = end.perplexity
    taken = after < before
    change = f"held-out perplexity {before:.2f} -> {after:.2f}"
    progress.say(f"closed form: {change}" + ("" if taken else "; no better, so the model stays as it was cut"))
    text = {"description": corpus.description, "tokens": corpus.tokens, "sha256": corpus.sha256}
    heal = {
        "settings": {"closed-form": asdict(settings)},
        "text": text,
        "stages": [
            {"stage": "cut", "held_out_perplexity": before},
            {"stage": "closed-form", "held_out_perplexity": after, "taken": taken},
        ],
        **({"starts": end.perplexities} if len(begin) > 1 else {}),
        "read_outs": end.fits,
    }
    done = end.recipe if taken else recipe
    done = replace(done, provenance={**recipe.provenance, "heal": heal})
    with full_disk_named(run):
        kept.parent.mkdir(exist_ok=True)
        schema.save(done, kept)
    forget(ends)
    return _result(done, kept, forwards, fresh=True)


def beginnings(folder: Ladder, recipe: Recipe, architecture: Architecture) -> list[Start]:
    """Where the fit of a ladder's recipe may begin (see `intarsia.healing.restarts`), with `LAST_BLOCKS` of the blocks
    of the original that the step to its depth was held against, those of least loss there.

    They were compared with one layer of each fitted: the layers behind it may change their order (dev/LOG.md).
    """
    found = starts(recipe, architecture)
    entry = next((entry for entry in folder.log() if entry["layers"] == len(recipe.layers)), {})
    tried = entry.get("evidence", {}).get("repair", {}).get("finalists", ())
    blocks = sorted((each for each in tried if "of" in each), key=lambda each: min(each["held_out_loss"]))
    whole = identity(recipe.variant(recipe.base), recipe.depth).layers
    others: list[Start] = []
    for first, end in (each["replaced"] for each in blocks):
        block = recipe.with_layers([*whole[:first], *whole[end:]])
        if block.layers != recipe.layers:
            others.append(Start(name=f"that leaves {first} to {end - 1} out of the original", recipe=block))
    return found + others[:LAST_BLOCKS]


def heal_passes_at_most(architecture: Architecture, planner: Planner) -> int:
    """Passes of the whole model over the calibration text that `repaired` takes: a fit from each starting point."""
    starts = 1 if planner.in_loop is None else 2 + min(LAST_BLOCKS, planner.blocks)
    return starts * fit_passes_at_most(architecture)


def _set_aside(corpus: Corpus, settings: ClosedFormSettings) -> tuple[ClosedFormSettings, Corpus, list[int]]:
    """Half of the held-out sequences, which then choose no ridge strength, to judge a fit by: the settings that hold
    out as many as it takes, the text, and which sequences a fit must not see."""
    most = max(2, (len(corpus) + 1) // 2)
    settings = replace(settings, held_out=min(settings.held_out, ClosedFormSettings.held_out, most))
    held_out = list(range(0, len(corpus), settings.held_out))
    unseen = held_out[1::2]
    rows = unseen or held_out  # of two sequences there is no other
    mask = None if corpus.mask is None else corpus.mask[rows]
    return settings, Corpus.of(corpus.input_ids[rows], mask=mask, description="held-out text", documents=1), unseen


def _result(recipe: Recipe, path: Path, forwards: int, *, fresh: bool) -> Repaired:
    heal: Mapping[str, Any] = recipe.provenance["heal"]
    return Repaired(
        recipe=recipe,
        path=path,
        fresh=fresh,
        taken=heal["stages"][-1]["taken"],
        read_outs=sum(row["ridge"] is not None for row in heal["read_outs"]),
        tokens=heal["text"]["tokens"],
        start=min(heal["starts"], key=heal["starts"].get) if "starts" in heal else None,
        forwards=forwards,
    )
