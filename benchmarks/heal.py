"""The effect of each heal stage on the demo model, at several depths.

First what `compress` makes at each of `--efforts`. Then pruned by each of `--methods` (removal by calibration loss, of
one block, CoMe-P, CoMe-P healed in the loop, and that with finalists), and the closed form over all layers on 64k
tokens, as `compress` does it; of `--train` also layerwise distillation on 500k on top, and end-to-end distillation on
200k on top of that. `--against 25` adds, at that depth, end-to-end distillation alone for as long as both took
together, and the same training of the model after a plain removal. `--text 21` adds, at that depth, end-to-end
distillation that learns from the text too (cross-entropy), on top of layerwise. Texts as in the benchmark `quality`,
whose ladders are used if they exist. Every row is kept, so a stopped benchmark resumes.

    python -m benchmarks heal --data ../shared/data -o out/bench/heal
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import intarsia
from intarsia import progress
from intarsia.commands.heal import TrainingText
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.options import EvalSpec, Output, Target, TextSpec
from intarsia.pruning.efforts import EFFORTS
from intarsia.pruning.methods.come_p import ComePSettings

COMPRESSED = {
    "come-p-in-loop": ComePSettings(spans=5, heal_in_loop=True),
    "come-p-finalists": ComePSettings(spans=5, granularity=5, removals=True, heal_in_loop=True, finalists=4, blocks=5),
}
CUTS = ("come-p", "sleb")
METHODS = (*CUTS, "angular", *COMPRESSED)
TEXTS = ("WikiText-2", "news")
# Found on the model pruned to 21 layers (dev/LOG.md).
LAYERWISE = LayerwiseSettings()
END_TO_END = EndToEndSettings(lr=3e-4, lora=None, top_k=None)
# A model that is near the original bears smaller steps only.
SMALLER_STEPS = {27: 1e-4, 25: 2e-4}
WITH_TEXT = replace(END_TO_END, lr=2e-4, cross_entropy=0.5)


class Bench:
    """The finished rows, and how to compute the others."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.plans: Path = given.plans
        self.tokens: dict[str, int] = {
            "closed-form": given.tokens[0],
            "layerwise": given.tokens[1],
            "end-to-end": given.tokens[2],
        }
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

    def cut(self, method: str, layers: int) -> Path:
        """The pruned model, not healed."""
        run = self.plans / method
        with progress.shown():
            intarsia.plan("demo", run, Target(layers=self.deepest), **self.planning(method))
        folder = self.out / f"{method}-{layers}"
        if not folder.exists():
            intarsia.build(run, folder, layers=layers)
        if f"{method} {layers} cut" not in self.found:
            self.measure(f"{method} {layers} cut", str(folder), 0.0)
        return folder

    def planning(self, method: str) -> dict[str, Any]:
        """The planning options of a method."""
        chosen = f"{method}[criterion=loss]" if method == "sleb" else COMPRESSED.get(method, method)
        return {"method": chosen, "text": TextSpec(sources=tuple(self.data))}

    def effort(self, effort: Any, layers: int) -> None:
        """Run `compress` at an effort."""
        folder, key, started = self.out / f"effort-{effort}-{layers}", f"effort {effort} {layers}", time.perf_counter()
        if key not in self.found:
            out = Output(path=folder, run=self.plans / f"effort-{effort}", overwrite=folder.exists())
            text, evaluation = TextSpec(sources=tuple(self.data)), EvalSpec(windows=(8,), speed=False)
            with progress.shown():
                intarsia.compress("demo", out, Target(layers=layers, effort=effort), text=text, evaluation=evaluation)
            self.measure(key, str(folder), time.perf_counter() - started)

    def compressed(self, method: str, layers: int) -> Path:
        """Run `compress` for a model that is healed from several starts."""
        folder, key = self.out / f"{method}-{layers}-cf", f"{method} {layers} closed form"
        started = time.perf_counter()
        if not folder.exists():
            out = Output(path=folder, run=self.plans / method)
            evaluation = EvalSpec(windows=(8,), speed=False)
            with progress.shown():
                intarsia.compress("demo", out, Target(layers=layers), evaluation=evaluation, **self.planning(method))
        if key not in self.found:
            self.measure(key, str(folder), time.perf_counter() - started)
        return folder

    def heal(self, source: Path, layers: int, stage: str, name: str, key: str, **options: Any) -> Path:
        """One stage on top of a model."""
        folder = self.out / name
        tokens = options.pop("tokens", self.tokens.get(stage, 0)) // 512 * 512
        steps = replace(END_TO_END, lr=SMALLER_STEPS.get(layers, END_TO_END.lr))
        settings = {"layerwise": LAYERWISE, "end-to-end": options.pop("end_to_end", steps)}
        if not folder.exists():
            text = TrainingText(sources=tuple(self.data), tokens=tokens)
            with progress.shown():
                result = intarsia.heal(source, folder, text, stages=settings.get(stage, stage))
            (self.out / f"{name}.json").write_text(json.dumps(result.to_dict(), indent=2, default=str))
        if key not in self.found:
            seconds = sum(row["seconds"] for row in json.loads((self.out / f"{name}.json").read_text())["stages"])
            self.measure(key, str(folder), seconds)
        return folder

    def depth(self, method: str, layers: int, *, train: bool) -> None:
        """A method at one depth, with its stages."""
        cut = self.cut(method, layers)
        if method in COMPRESSED:
            healed = self.compressed(method, layers)
        else:
            # A sixteenth is held out: all of them are fitted on so many tokens.
            all_of_it = {"tokens": self.tokens["closed-form"] * 16 // 15}
            healed = self.heal(
                cut, layers, "closed-form", f"{method}-{layers}-cf", f"{method} {layers} closed form", **all_of_it
            )
        if train:
            trained = self.heal(healed, layers, "layerwise", f"{method}-{layers}-lw", f"{method} {layers} layerwise")
            self.heal(trained, layers, "end-to-end", f"{method}-{layers}-e2e", f"{method} {layers} end-to-end")

    def against(self, layers: int) -> None:
        """End-to-end alone for the time that layerwise and end-to-end took, from both cuts."""
        trained = self.trained(layers)
        took = {stage: self.found[f"{trained} {layers} {stage}"]["seconds"] for stage in ("layerwise", "end-to-end")}
        tokens = round(self.tokens["end-to-end"] * sum(took.values()) / took["end-to-end"])
        for method in (trained, "sleb"):
            self.heal(
                self.out / f"{method}-{layers}-cf",
                layers,
                "end-to-end",
                f"{method}-{layers}-alone",
                f"{method} {layers} end-to-end alone",
                tokens=tokens,
            )

    def with_text(self, layers: int) -> None:
        """End to end after layerwise, from the text besides the teacher."""
        trained = self.trained(layers)
        source, name = self.out / f"{trained}-{layers}-lw", f"{trained}-{layers}-text"
        self.heal(source, layers, "end-to-end", name, f"{trained} {layers} end-to-end and text", end_to_end=WITH_TEXT)

    def trained(self, layers: int) -> str:
        """The method whose model was trained at that depth."""
        return next(method for method in METHODS if f"{method} {layers} end-to-end" in self.found)

    def table(self, text: str, depths: list[int]) -> None:
        """Print the table of one text."""
        dense = self.found["dense"][text]
        print(f"\n{text} (dense {dense:.2f}); in brackets the share of the gap that is closed\n")
        columns = ("cut", "closed form", "layerwise", "end-to-end", "end-to-end alone", "end-to-end and text")
        print(f"| layers | | {' | '.join(columns)} |")
        print("|---:|---|" + "---:|" * len(columns))
        for layers in depths:
            cuts = [self.found[key][text] for method in CUTS if (key := f"{method} {layers} cut") in self.found]

            def cell(key: str, cuts: list[float] = cuts) -> str:
                if key not in self.found:
                    return ""
                value = self.found[key][text]
                share = f" ({1.0 - math.log(value / dense) / math.log(min(cuts) / dense):.0%})" if cuts else ""
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
    parser.add_argument("--plans", type=Path, default=Path("out/bench/quality"), help="run folders of `quality`")
    parser.add_argument("--layers", type=int, nargs="+", default=[27, 25, 23, 21])
    parser.add_argument("--against", type=int, nargs="*", default=[])
    parser.add_argument("--text", type=int, nargs="*", default=[])
    parser.add_argument("--efforts", nargs="*", default=["quick", "standard"], choices=list(EFFORTS))
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--train", nargs="*", default=["come-p-finalists"], choices=METHODS)
    parser.add_argument(
        "--tokens", type=int, nargs=3, default=[65536, 500_000, 200_000], metavar=("FIT", "LAYERWISE", "END_TO_END")
    )
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
                bench.depth(method, layers, train=method in given.train)
            if layers in given.against:
                bench.against(layers)
            if layers in given.text:
                bench.with_text(layers)
    for text in TEXTS:
        bench.table(text, given.layers)


if __name__ == "__main__":
    main()
