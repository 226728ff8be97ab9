"""Every method on the demo model, pruned and healed in closed form: perplexity, and accuracy on five choice tasks.

Calibration: equal parts of WikiText-2 (validation), news without its last tenth, and speeches. Evaluation: the first
64 windows of 512 tokens of WikiText-2 (test), 16 windows of that last tenth of the news, and at some depths the first
items of the last two thirds of each task. Healed rows are fitted lightly: on unchanged layers only
down_proj, without o_proj as in `intarsia compress` and `compare`. A stopped benchmark resumes.

    python -m benchmarks compare --data ../shared/data -o out/bench/compare
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import intarsia
from intarsia import progress
from intarsia.commands.compare import CompareEval, Entrants
from intarsia.options import TextSpec
from intarsia.registry import planners
from intarsia.reporting.comparison import DENSE, Comparison, Row, load

HEALS = ("none", "closed-form")
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa")
_LAST_TWO_THIRDS = "0.3333:1"  # of a file of fewer than 10,000 items
WIKITEXT, NEWS = "WikiText-2", "news"
LIGHT = "closed-form[fit_unchanged=mlp,fit_held_out=8]"
"""A fit at half the cost of the default, since there are forty of them."""


def parser(description: str | None, *, out: str, layers: Sequence[int]) -> argparse.ArgumentParser:
    """The options that both comparisons have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, default=Path("../shared/data"))
    found.add_argument("-o", "--out", type=Path, default=Path(out))
    found.add_argument("--layers", type=int, nargs="+", default=list(layers))
    found.add_argument("--heal", nargs="+", default=list(HEALS), choices=HEALS)
    found.add_argument("--tokens", type=int, default=65536)
    found.add_argument("--eval-windows", type=int, nargs=2, default=[64, 16], metavar=("WIKITEXT", "NEWS"))
    found.add_argument("--model", default="demo")
    return found


def compared(given: argparse.Namespace, methods: Sequence[str], **more: Any) -> Comparison:
    """The comparison on the project's texts."""
    text = given.data / "text"
    sources = (
        str(text / "wikitext2.valid.txt"),
        f"{text / 'abc_news.txt'}#0:0.9",
        str(text / "state_union.txt"),
    )
    kinds = {"none": "none", "closed-form": LIGHT}
    entrants = Entrants(
        methods=tuple(methods), layers=tuple(given.layers), heal=tuple(kinds[kind] for kind in given.heal)
    )
    texts = (f"{WIKITEXT}={text / 'wikitext2.test.raw.txt'}", f"{NEWS}={text / 'abc_news.txt'}#0.9:1")
    evaluation = CompareEval(text=texts, windows=tuple(given.eval_windows), **more)
    with progress.shown():
        intarsia.compare(
            given.model, given.out, entrants, evaluation, text=TextSpec(sources=sources, tokens=given.tokens)
        )
    found = load(given.out)
    rows = (replace(row, heal="closed-form" if row.heal == LIGHT else row.heal) for row in found.rows)
    return replace(found, rows=tuple(rows))


def main() -> None:
    """Compare and print."""
    options = parser(__doc__, out="out/bench/compare", layers=(27, 25, 23, 21))
    options.add_argument("--methods", nargs="+", default=list(planners.names), help="default: all")
    options.add_argument("--task-layers", type=int, nargs="*", default=[25, 21])
    options.add_argument("--limit", type=int, default=100)
    given = options.parse_args()
    tasks = [f"{given.data / 'tasks' / task}.jsonl#{_LAST_TWO_THIRDS}" for task in TASKS] if given.task_layers else []
    more = {"tasks": tasks, "task_layers": given.task_layers, "limit": given.limit} if tasks else {}
    found = compared(given, given.methods, **more)
    rows = {row.key: row for row in found.rows}
    dense = next(row for row in found.rows if row.method == DENSE)
    names = [(method, heal) for method in given.methods for heal in given.heal]

    whole = _pair([dense.perplexity[text]["value"] for text in found.texts])
    print(f"\nPerplexity, {WIKITEXT} / {NEWS}. Dense: {whole}\n")
    print(_table(names, given.layers, lambda key: _perplexities(rows.get(key), found.texts)))
    if tasks:
        mean, error = _mean_accuracy(dense)
        scores = (dense.tasks or {})["scores"]
        n, chance = sum(score["n"] for score in scores), sum(score["chance"] for score in scores) / len(scores)
        print(f"\nMean accuracy ± standard error on {len(tasks)} tasks, {n} items, and how much of the dense model's")
        print(f"({mean:.3f} ± {error:.3f}) that is, with its 95 % interval by paired bootstrap.")
        print(f"Guessing gives {chance:.3f}.\n")
        print(_table(names, given.task_layers, lambda key: _accuracy(rows.get(key)), least_is_best=False))
    shared = dense.layer_forwards or 0.0
    print(f"\nCost down to {min(given.layers)} layers, after a shared pass of {shared:.0f}\n")
    print("| method | layer-forwards | seconds |\n|---|---:|---:|")
    for method in given.methods:
        row = rows.get((method, min(given.layers), given.heal[0]))
        if row is not None and row.recipe is not None:
            print(f"| {method} | {row.layer_forwards:.0f} | {row.plan_seconds:.0f} |")


Cell = tuple[str, tuple[float, ...]]
"""What a cell says, and the numbers in it by which the best of a column is found."""


def _table(names: Iterable[tuple[str, str]], layers: Sequence[int], cell: Any, *, least_is_best: bool = True) -> str:
    """Methods by depths; of every number in a column the best one is bold."""
    names = list(names)
    cells: Mapping[Any, Cell] = {(*name, depth): cell((name[0], depth, name[1])) for name in names for depth in layers}
    lines = ["| method | " + " | ".join(map(str, layers)) + " |", "|---|" + "---:|" * len(layers)]
    best = {}
    for depth in layers:
        columns = zip(*(numbers for key, (_, numbers) in cells.items() if key[2] == depth and numbers), strict=True)
        best[depth] = [min(column) if least_is_best else max(column) for column in columns]
    for method, heal in names:
        written = []
        for depth in layers:
            text, numbers = cells[method, heal, depth]
            parts = zip(text.split(" / "), numbers, best[depth], strict=True) if numbers else [(text, 0.0, None)]
            written.append(" / ".join(f"**{part}**" if number == top else part for part, number, top in parts))
        name = f"`{method}`" + ("" if heal == "none" else ", healed")
        lines.append(f"| {name} | " + " | ".join(written) + " |")
    return "\n".join(lines)


def _perplexities(row: Row | None, texts: Sequence[str]) -> Cell:
    if row is None or not row.perplexity:
        return "—", ()
    values = [row.perplexity[text]["value"] for text in texts]
    return _pair(values), tuple(values)


def _pair(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" if value < 1000 else f"{value:.2g}" for value in values)


def _accuracy(row: Row | None) -> Cell:
    if row is None or row.tasks is None:
        return "—", ()
    mean, error = _mean_accuracy(row)
    text = f"{mean:.3f} ± {error:.3f}"
    kept = ((row.tasks.get("retention") or {}).get("mean") or {}).get("accuracy")
    if kept is not None and kept["low"] is not None:
        text += f", {kept['value']:.0%} ({kept['low']:.0%} to {kept['high']:.0%})"
    return text, (mean,)


def _mean_accuracy(row: Row) -> tuple[float, float]:
    """Mean over the tasks and its standard error, tasks being independent."""
    assert row.tasks is not None
    found = [score["metrics"][score["primary"]] for score in row.tasks["scores"]]
    error = math.sqrt(sum((metric["stderr"] or 0.0) ** 2 for metric in found)) / len(found)
    return row.tasks["mean"], error


if __name__ == "__main__":
    main()
