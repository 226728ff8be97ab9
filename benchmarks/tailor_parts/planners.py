"""Part `planners`: single-model planners on the base and on the best variant, healed in closed form.

They look at the text that the objectives show a search. Ladders of the base that were made elsewhere (`--plans`) are
scored too. Each model is healed towards the member that it was pruned from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import intarsia
from benchmarks.tailor_parts.scorer import Scorer, mean
from benchmarks.tailor_parts.setting import VARIANTS, Rows, Setting
from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import LoadedModel, default_device
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.healing.closed_form import fit
from intarsia.healing.teacher import TeacherStates
from intarsia.options import Target, TextSpec
from intarsia.progress import reporting_to
from intarsia.pruning.ladder import Ladder
from intarsia.recipe.recipe import Concat, Fitted, Merge, Op, Recipe, Select
from intarsia.tailoring.family_file import BASE

METHODS = ("shortgpt", "sleb", "come", "come-p")


def run(scorer: Scorer, setting: Setting, rows: Rows, *, methods: tuple[str, ...], given: Path | None) -> None:
    """Plan, heal and score."""
    members(scorer, setting)
    for method, folder in _ladders(given):
        _score(scorer, setting, rows, BASE, f"{method} (given)", folder)
    for member in (BASE, best_variant(rows)):
        for method in methods:
            if f"{method} on {member}" not in rows:
                _score(scorer, setting, rows, member, method, plan(setting, member, method))


def members(scorer: Scorer, setting: Setting) -> None:
    """Score the base and the variants as they are."""
    for member in (BASE, *VARIANTS):
        scorer.row(member, setting.whole(member))


def best_variant(rows: Rows) -> str:
    """The variant of the best mean score."""
    return max(VARIANTS, key=lambda member: mean(rows[member], rows[BASE]))


def plan(setting: Setting, member: str, method: str) -> Path:
    """The run folder of a planner on a member of the family."""
    folder = setting.out / "plans" / member / method
    text = TextSpec(sources=tuple(setting.calibration), tokens=setting.tokens[0])
    with reporting_to(setting.progress):
        intarsia.plan(setting.folder(member), folder, Target(layers=setting.layers), method=method, text=text)
    return folder


def _ladders(given: Path | None) -> Iterator[tuple[str, Path]]:
    """The run folders of planners in a folder."""
    for folder in sorted(given.iterdir()) if given is not None else ():
        if (folder / "settings.json").exists() and (folder / "ladder").is_dir():
            yield folder.name, folder


def _score(scorer: Scorer, setting: Setting, rows: Rows, member: str, method: str, folder: Path) -> None:
    found = Ladder.existing(folder)
    if setting.layers not in found.depths():
        print(f"{method} on {member}: no ladder down to {setting.layers} layers")
        return
    pruned = found.recipe(setting.layers)
    flat = _in_family(pruned, setting.whole(member))
    key = f"{method} on {member}"
    if key not in rows:
        scorer.row(key, replace(flat, fitted=_fitted(scorer, setting, member, pruned)))


def _in_family(pruned: Recipe, member: Recipe) -> Recipe:
    """The recipe of a plan made on one member alone, with the layers of that member in the family."""

    def of_member(op: Op) -> Op:
        found = [member.layers[source.layer].sources[0] for source in op.sources]
        if isinstance(op, Concat):
            return replace(op, cuts=tuple(replace(cut, source=ref) for cut, ref in zip(op.cuts, found, strict=True)))
        return replace(op, sources=tuple(found)) if isinstance(op, Merge) else Select(source=found[0])

    return replace(member, layers=tuple(map(of_member, pruned.layers)), spans=pruned.spans)


def _fitted(scorer: Scorer, setting: Setting, member: str, pruned: Recipe) -> Fitted:
    checkpoint = open_checkpoint(setting.folder(member))
    resident = LoadedModel(checkpoint, device=default_device())
    with TeacherStates(Loop(resident, Batches(scorer.corpus, resident.device))) as teacher:
        return fit(pruned, teacher)[0].fitted
