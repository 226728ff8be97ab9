"""Parts `ablation` and `engines`: searches of equal trials, their incumbents scored and healed.

All searches begin with the base without layers of its middle. Those of the ablation begin also with what removal
(`sleb`) leaves of the base, taken from every member and from their merges, as far as operations allow. With `--heal
finalists` the trials of the greatest budget are healed before they are scored; the model that a search finds is healed
in any case. Engines are compared on pruned models, and on what they find themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.tailor_parts.planners import plan
from benchmarks.tailor_parts.scorer import Scorer
from benchmarks.tailor_parts.setting import ABLATION, Setting
from intarsia.commands.tailor import FinalOptions, SearchOptions, tailor
from intarsia.tailoring.family_file import BASE, RANDOM_MIDDLE
from intarsia.tailoring.recipes import trial_recipe
from intarsia.tailoring.run import TailorRun, is_tailor_run

ENGINES = ("evolve", "smac", "random")
START = "sleb"
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
    *,
    seeds: Sequence[int],
    engine: str,
    heal: str,
    kinds: Sequence[str],
) -> None:
    """The same search with one operation more each time."""
    starts = [RANDOM_MIDDLE, str(plan(setting, BASE, START))]
    for seed, operations in product(seeds, kinds):
        name = _search(setting, operations, engine, seed, operations=ABLATION[operations], starts=starts, heal=heal)
        _score(scorer, setting, name)


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


def _score(scorer: Scorer, setting: Setting, name: str) -> None:
    """Score the knee of the front, healed; anew when the search has gone on."""
    folder = TailorRun.existing(folder_of(setting, name))
    trials = len(folder.made)
    if scorer.has(name, trials=trials):
        return
    front = folder.front
    if front is None:
        print(f"{name}: no trial has succeeded")
        return
    recipe = trial_recipe(folder, front.knee, healed=False)
    scorer.row(name, scorer.healed(recipe), trials=trials)
