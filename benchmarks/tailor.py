"""What tailoring reaches on the demo family: base, math and science variant, 23 of 30 layers.

Parts, each of which can be run alone; `--parts` takes several, in order. Everything that is finished is kept in the
folder and only read when the command is run again, and a search resumes where it was.

- `planners`: planners for a single model, on the base and on the best variant, healed in closed form.
- `ablation`: searches that may remove; remove and select; and merge; and combine half layers, or concatenate. Equal
  trials; what they find is healed in closed form.
- `engines`: evolve, smac and random search with all operations at equal trials: curves.
- `workers`: trials of two workers against those of one; needs two idle cores, and is left out unless it is named.
- `table`: print what is there.

How models are scored is described in `benchmarks/tailor_parts/scorer.py`, what curves show in `curves.py` beside it.

    python -m benchmarks tailor --data ../shared/data --models ../shared/models -o out/bench/tailor
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.tailor_parts import planners, searches, tables, workers
from benchmarks.tailor_parts.scorer import Scorer
from benchmarks.tailor_parts.setting import ABLATION, Rows, Setting
from intarsia import progress

PARTS = ("planners", "ablation", "engines", "table")
_ALL = (*PARTS, "workers")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, default=Path("../shared/data"))
    found.add_argument("--models", type=Path, default=Path("../shared/models"))
    found.add_argument("-o", "--out", type=Path, default=Path("out/bench/tailor"))
    found.add_argument("--parts", type=_listed, default=PARTS, help=f"of {', '.join(_ALL)}; by comma")
    found.add_argument("--seeds", type=_listed, default=("0", "1", "2"), help="by comma")
    found.add_argument("--trials", type=int, default=60, help="of each search")
    found.add_argument("--budgets", type=_listed, default=("27", "81"), help="the least and the greatest, by comma")
    found.add_argument("--engines", type=_listed, default=searches.ENGINES, help="by comma")
    found.add_argument("--heal", choices=("none", "finalists"), default="none", help="trials of the ablation")
    found.add_argument(
        "--operations", type=_listed, default=tuple(ABLATION), help="of the ablation: its rows, by comma"
    )
    found.add_argument("--ablate-with", default="evolve", help="the engine of the ablation")
    found.add_argument("--methods", type=_listed, default=planners.METHODS, help="planners, by comma")
    found.add_argument("--base", default="demo")
    found.add_argument("--layers", type=int, default=23)
    found.add_argument("--items", type=int, default=200, help="of each task, to measure on")
    found.add_argument("--windows", type=int, nargs=2, default=[16, 12], metavar=("WIKITEXT", "NEWS"))
    found.add_argument("--tokens", type=int, nargs=3, default=[8192, 16384, 4096], metavar=("PLAN", "HEAL", "PIECES"))
    given = found.parse_args(arguments)
    unknown = [part for part in given.parts if part not in _ALL]
    if unknown:
        found.error(f"--parts: no {', '.join(unknown)} among {', '.join(_ALL)}")
    if set(given.operations) - {*ABLATION}:
        found.error(f"--operations: of {', '.join(ABLATION)}")
    if len(given.budgets) != 2:
        found.error("--budgets: two numbers")
    return given


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def main() -> None:
    """Run the parts."""
    given = options()
    setting = Setting(
        data=given.data,
        models=given.models,
        out=given.out,
        base=given.base,
        layers=given.layers,
        trials=given.trials,
        budgets=(int(given.budgets[0]), int(given.budgets[1])),
        tokens=tuple(given.tokens),
        items=given.items,
        windows=tuple(given.windows),
        progress=progress.current(),
    )
    rows = Rows(setting.out / "rows.json")
    scorer, seeds = Scorer(setting, rows), [int(seed) for seed in given.seeds]
    print(f"{torch.get_num_threads()} thread(s); {setting.out}", flush=True)
    for part in given.parts:
        print(f"== {part}", flush=True)
        if part == "planners":
            planners.run(scorer, setting, rows, methods=given.methods)
        elif part == "ablation":
            planners.members(scorer, setting)
            how = {"engine": given.ablate_with, "heal": given.heal, "kinds": given.operations}
            searches.ablation(scorer, setting, seeds=seeds, **how)
        elif part == "engines":
            searches.engines(setting, seeds=seeds, names=given.engines)
        elif part == "workers":
            found = workers.run(setting, trials=24)
            (setting.out / "workers.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        else:
            tables.write(setting, rows)


if __name__ == "__main__":
    main()
