"""What the efforts, and the closed form after other methods, make of the demo model at several depths.

First what `compress` makes at each of `--efforts`. Then pruned by each of `--methods`, and the closed form over all
layers on 64k tokens, as `compress` does it. Calibration: equal parts of WikiText-2 (validation), news without its last
tenth, and speeches. Evaluation: the first 64 windows of 512 tokens of WikiText-2 (test), and 16 windows of that last
tenth of the news. Every row is kept, so a stopped benchmark resumes.

    python -m benchmarks heal --data ../shared/data -o out/bench/heal
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import intarsia
from intarsia import progress
from intarsia.commands.heal import TrainingText
from intarsia.options import EvalSpec, Output, Target, TextSpec
from intarsia.pruning.efforts import EFFORTS

METHODS = {"come-p": "come-p", "sleb": "sleb[criterion=loss]", "angular": "angular"}
TEXTS = ("WikiText-2", "news")


class Bench:
    """The finished rows, and how to compute the others."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.plans = self.out / "plans"
        self.tokens: int = given.tokens
        self.deepest: int = min(given.layers)
        data: Path = given.data / "text"
        self.data = [
            str(data / "wikitext2.valid.txt"),
            f"{data / 'abc_news.txt'}#0:0.9",
            str(data / "state_union.txt"),
        ]
        self.texts = {
            "WikiText-2": (str(data / "wikitext2.test.raw.txt"), 64),
            "news": (f"{data / 'abc_news.txt'}#0.9:1", 16),
        }
        self.rows = self.out / "rows.json"
        self.out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, dict[str, float]] = json.loads(self.rows.read_text()) if self.rows.exists() else {}

    def measure(self, key: str, model: str, seconds: float) -> None:
        """Record a row: perplexities, and the seconds of the last stage."""
        values = {
            name: intarsia.evaluate_perplexity(model, text, windows=windows).value
            for name, (text, windows) in self.texts.items()
        }
        self.found = json.loads(self.rows.read_text()) if self.rows.exists() else {}  # others write here too
        self.found[key] = {**values, "seconds": seconds}
        self.rows.write_text(json.dumps(self.found, indent=2))
        print(key, {name: round(value, 2) for name, value in self.found[key].items()}, flush=True)

    def pruned(self, method: str, layers: int) -> Path:
        """The pruned model, not healed."""
        run = self.plans / method
        text = TextSpec(sources=tuple(self.data))
        with progress.shown():
            intarsia.plan("demo", run, Target(layers=self.deepest), method=METHODS[method], text=text)
        folder = self.out / f"{method}-{layers}"
        if not folder.exists():
            intarsia.build(run, folder, layers=layers)
        if f"{method} {layers} pruned" not in self.found:
            self.measure(f"{method} {layers} pruned", str(folder), 0.0)
        return folder

    def effort(self, effort: Any, layers: int) -> None:
        """Run `compress` at an effort."""
        folder, key, started = self.out / f"effort-{effort}-{layers}", f"effort {effort} {layers}", time.perf_counter()
        if key not in self.found:
            out = Output(path=folder, run=self.plans / f"effort-{effort}", overwrite=folder.exists())
            text, evaluation = TextSpec(sources=tuple(self.data)), EvalSpec(windows=(8,), speed=False)
            with progress.shown():
                intarsia.compress("demo", out, Target(layers=layers, effort=effort), text=text, evaluation=evaluation)
            self.measure(key, str(folder), time.perf_counter() - started)

    def depth(self, method: str, layers: int) -> None:
        """A method at one depth, pruned and healed."""
        pruned = self.pruned(method, layers)
        folder, key = self.out / f"{method}-{layers}-cf", f"{method} {layers} closed form"
        started = time.perf_counter()
        if not folder.exists():
            # A sixteenth is held out: all of the tokens are fitted on.
            text = TrainingText(sources=tuple(self.data), tokens=self.tokens * 16 // 15 // 512 * 512)
            with progress.shown():
                intarsia.heal(pruned, folder, text, stages="closed-form")
        if key not in self.found:
            self.measure(key, str(folder), time.perf_counter() - started)

    def table(self, text: str, depths: list[int]) -> None:
        """Print the table of one text."""
        dense = self.found["dense"][text]
        print(f"\n{text} (dense {dense:.2f}); in brackets the share of the gap that is closed\n")
        columns = ("pruned", "closed form")
        print(f"| layers | | {' | '.join(columns)} |")
        print("|---:|---|" + "---:|" * len(columns))
        for layers in depths:
            pruned = [self.found[key][text] for method in METHODS if (key := f"{method} {layers} pruned") in self.found]

            def cell(key: str, pruned: list[float] = pruned) -> str:
                if key not in self.found:
                    return ""
                value = self.found[key][text]
                share = f" ({1.0 - math.log(value / dense) / math.log(min(pruned) / dense):.0%})" if pruned else ""
                return f"{value:.1f}{share}"

            for effort in EFFORTS:
                if found := cell(f"effort {effort} {layers}"):
                    print(f"| {layers} | `compress --effort {effort}`: {found} |{' |' * len(columns)}")
            for method in METHODS:
                print(f"| {layers} | {method} | {' | '.join(cell(f'{method} {layers} {each}') for each in columns)} |")


def main() -> None:
    """Prune, heal, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("out/bench/heal"))
    parser.add_argument("--layers", type=int, nargs="+", default=[27, 25, 23, 21])
    parser.add_argument("--efforts", nargs="*", default=["quick", "standard"], choices=list(EFFORTS))
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--tokens", type=int, default=65536, help="of the closed form after a method")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    bench = Bench(given)
    if not given.table:
        if "dense" not in bench.found:
            bench.measure("dense", "demo", 0.0)
        for layers in given.layers:
            for effort in given.efforts:
                bench.effort(effort, layers)
            for method in given.methods:
                bench.depth(method, layers)
    for text in TEXTS:
        bench.table(text, given.layers)


if __name__ == "__main__":
    main()
