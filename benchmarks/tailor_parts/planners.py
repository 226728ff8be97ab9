"""Part `planners`: single-model planners on the base and on the best variant, healed in closed form.

They look at the text that the objectives show a search. Each model is healed toward the member that it was pruned
from.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import intarsia
from benchmarks.tailor_parts.scorer import Scorer, mean
from benchmarks.tailor_parts.setting import VARIANTS, Rows, Setting
from intarsia.options import Target, TextSpec
from intarsia.progress import reporting_to
from intarsia.pruning.ladder import Ladder
from intarsia.recipe.recipe import Concat, Merge, Op, Recipe, Select
from intarsia.tailoring.family_file import BASE

METHODS = ("shortgpt", "sleb", "come", "come-p")


def run(scorer: Scorer, setting: Setting, rows: Rows, *, methods: tuple[str, ...]) -> None:
    """Plan, heal and score."""
    members(scorer, setting)
    for member, method in product((BASE, best_variant(rows)), methods):
        key = f"{method} on {member}"
        if key not in rows:
            pruned = Ladder.existing(plan(setting, member, method)).recipe(setting.layers)
            scorer.row(key, scorer.healed(_in_family(pruned, setting.whole(member))))


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


def _in_family(pruned: Recipe, member: Recipe) -> Recipe:
    """The recipe of a plan made on one member alone, with the layers of that member in the family."""

    def of_member(op: Op) -> Op:
        found = [member.layers[source.layer].sources[0] for source in op.sources]
        if isinstance(op, Concat):
            return replace(op, cuts=tuple(replace(cut, source=ref) for cut, ref in zip(op.cuts, found, strict=True)))
        return replace(op, sources=tuple(found)) if isinstance(op, Merge) else Select(source=found[0])

    return replace(member, layers=tuple(map(of_member, pruned.layers)), spans=pruned.spans)
