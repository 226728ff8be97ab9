"""Part `workers`: how many trials two workers make in the time of one, one thread and one core each.

Both make the same trials: candidates made from earlier ones by one move of the search, at one budget. Opening the
family and one trial to warm up are not counted. Needs a machine with two idle cores.
"""

from __future__ import annotations

import os
import time

from benchmarks.tailor_parts.setting import ABLATION, Setting
from benchmarks.tailor_trial import candidates
from intarsia.options import Runtime
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.family_file import FamilyFile, read_family_file
from intarsia.tailoring.search import OnDask, OpenScorer, dask_workers


def run(setting: Setting, *, trials: int) -> dict[str, float]:
    """Trials a minute of one worker and of two; printed, and returned with their ratio."""
    pace = {}
    recipes = candidates(_file(setting), setting.family, trials + 2)
    for count in (1, 2):
        pace[count] = _pace(setting, recipes, count)
        print(f"{count} worker(s): {pace[count]:.2f} trials a minute at budget {_budget(setting)}", flush=True)
    found = {"one": pace[1], "two": pace[2], "ratio": pace[2] / pace[1]}
    print(f"two workers make {found['ratio']:.2f} times the trials of one")
    return found


def _budget(setting: Setting) -> int:
    return min(3 * setting.budgets[0], setting.budgets[1])


def _file(setting: Setting) -> FamilyFile:
    return read_family_file(setting.family_file("workers", ABLATION["merge"], "evolve", 0, ()))


def _pace(setting: Setting, recipes: list[Recipe], count: int) -> float:
    """Trials a minute."""
    cores = os.sched_getaffinity(0)
    if len(cores) < count:
        raise SystemExit(f"{count} workers need {count} cores; this process may use {len(cores)}")
    # A pool gives each worker its share of the cores that the process may use.
    os.sched_setaffinity(0, sorted(cores)[:count])
    opener = OpenScorer(file=_file(setting).absolute(), runtime=Runtime(device="cpu"))
    budget = _budget(setting)
    try:
        with dask_workers(opener, scheduler=None, count=count) as hands:
            _warm_up(hands, recipes[:count], budget)
            rest = recipes[2:]
            started, waiting, open_ = time.perf_counter(), list(enumerate(rest)), 0
            while waiting or open_:
                while waiting and open_ < count:
                    number, recipe = waiting.pop(0)
                    hands.submit((str(number), budget), recipe, budget)
                    open_ += 1
                done = hands.next()
                open_ -= 1
                if done.outcome is None:
                    raise SystemExit(f"a trial failed: {done.reason}")
            return 60.0 * len(rest) / (time.perf_counter() - started)
    finally:
        os.sched_setaffinity(0, cores)


def _warm_up(hands: OnDask, recipes: list[Recipe], budget: int) -> None:
    """Trials until every worker has made one, for which it opens the family."""
    ready: set[str] = set()
    while len(ready) < hands.count:
        for number, recipe in enumerate(recipes):
            hands.submit((str(number), budget), recipe, budget)
        ready |= {hands.next().worker for _ in recipes}
