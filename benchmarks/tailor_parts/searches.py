"""Parts `ablation` and `engines`: searches of equal trials, their incumbents scored and healed.

All searches begin with the base without layers of its middle. Those of the ablation begin also with what two planners
leave of the base and of the best variant, taken from every member and from their merges, as far as operations allow.
It is made twice: for the best healed model, with the trials of the greatest budget healed before they are scored
(`heal: finalists`), and for the best pruned model. Engines are compared on pruned models, and on what they find
themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.tailor_parts.planners import HEALED, PRUNED, best_variant, plan
from benchmarks.tailor_parts.scorer import Scorer
from benchmarks.tailor_parts.setting import ABLATION, Rows, Setting
from intarsia.commands.tailor import FinalOptions, SearchOptions, tailor
from intarsia.tailoring.family_file import BASE, RANDOM_MIDDLE
from intarsia.tailoring.recipes import trial_recipe
from intarsia.tailoring.run import TailorRun, is_tailor_run

ENGINES = ("evolve", "smac", "random")
STARTS = ("sleb", "come-p")
HEALS = {"finalists": "", "none": "bare-"}
"""How the searches of the ablation score their trials, and what the names of such searches begin with."""
WHOLE = list(ABLATION)[-1]
CURVES = "curves"
"""What the searches that compare engines are called after, in the place of their operations."""


def name_of(operations: str, engine: str, seed: int) -> str:
    """What a search is called."""
    return f"{operations}-{engine}-{seed}"


def folder_of(setting: Setting, name: str) -> Path:
    """The run folder of a search."""
    return setting.out / "searches" / name


def is_finished(setting: Setting, name: str) -> bool:
    """Whether a search has made all trials that are asked for."""
    folder = folder_of(setting, name)
    return is_tailor_run(folder) and len(TailorRun(folder).made) >= setting.trials


def ablation(
    scorer: Scorer,
    setting: Setting,
    rows: Rows,
    *,
    seeds: Sequence[int],
    engine: str,
    heals: Sequence[str],
    kinds: Sequence[str],
) -> None:
    """The same search with one operation more each time."""
    planned = [plan(setting, member, method) for member in (BASE, best_variant(rows)) for method in STARTS]
    starts = [RANDOM_MIDDLE, *map(str, planned)]
    for seed, heal, operations in product(seeds, heals, kinds):
        kind = f"{HEALS[heal]}{operations}"
        name = _search(setting, kind, engine, seed, operations=ABLATION[operations], starts=starts, heal=heal)
        _score(scorer, setting, name, healed=heal != "none")


def engines(setting: Setting, *, seeds: Sequence[int], names: Sequence[str]) -> None:
    """All operations, by every engine."""
    for seed in seeds:
        for engine in names:
            _search(setting, CURVES, engine, seed, operations=ABLATION[WHOLE], starts=[RANDOM_MIDDLE], heal="none")


def _search(
    setting: Setting,
    kind: str,
    engine: str,
    seed: int,
    *,
    operations: Sequence[str],
    starts: Sequence[str],
    heal: str,
) -> str:
    """Search, or go on with a search, or find it finished."""
    name = name_of(kind, engine, seed)
    folder = folder_of(setting, name)
    if is_finished(setting, name):
        return name
    file = setting.family_file(name, operations, engine, seed, starts, heal=heal)
    started, cpu = time.perf_counter(), time.process_time()
    found = tailor(
        file,
        folder,
        search=SearchOptions(trials=setting.trials, calibration=tuple(setting.calibration), tokens=setting.tokens[2]),
        final=FinalOptions(score=False, build=False),
    )
    spent = f"{time.perf_counter() - started:.0f} s, {time.process_time() - cpu:.0f} s of the processor"
    print(f"{name}: {found.trials} trials, {found.failed} failed; {spent}", flush=True)
    return name


def _score(scorer: Scorer, setting: Setting, name: str, *, healed: bool) -> None:
    """The knee of the front, pruned, and healed where that was searched for; anew when the search has gone on."""
    folder = TailorRun.existing(folder_of(setting, name))
    trials = len(folder.made)
    if scorer.has(f"{name}, {HEALED if healed else PRUNED}", trials=trials):
        return
    front = folder.front
    if front is None:
        print(f"{name}: no trial has succeeded")
        return
    recipe = trial_recipe(folder, front.knee, healed=False)
    scorer.row(f"{name}, {PRUNED}", recipe, trials=trials)
    if healed:
        scorer.row(f"{name}, {HEALED}", scorer.healed(recipe), trials=trials)
