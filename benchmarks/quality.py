"""Perplexity of the demo model at several depths, by method.

Calibration: equal parts of WikiText-2 (validation), news without its last tenth, and speeches. Evaluation: the first
64 windows of 512 tokens of WikiText-2 (test), and 16 windows of that last tenth of the news. Each plan is a run
folder and each row is kept, so a stopped benchmark resumes.

    python -m benchmarks quality --data ../shared/data -o out/bench/quality
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import intarsia
from intarsia.options import NewModel, Target, TextSpec
from intarsia.progress import shown
from intarsia.pruning.methods.come import ComeSettings

METHODS: dict[str, Any] = {
    "shortgpt": "shortgpt",
    "come": "come",
    "come-p": "come-p",
    "come-p --spans 1": "come-p[spans=1]",
    "come-p --removals": "come-p[removals=true]",
    "come --norm average": "come[norm=average]",
    "come --preset paper": ComeSettings(**ComeSettings.presets["paper"]),
    "come --span-choice sleb": "come[span-choice=sleb]",
    "come-p --span-choice sleb": "come-p[span-choice=sleb]",
    "sleb": "sleb[criterion=loss]",
}
TABLE = ("shortgpt", "come", "come-p", "come-p --spans 1")


def main() -> None:
    """Plan, build and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("out/bench/quality"))
    parser.add_argument("--methods", nargs="+", default=list(TABLE), choices=list(METHODS))
    parser.add_argument("--layers", type=int, nargs="+", default=[28, 27, 25, 23, 21])
    parser.add_argument("--tokens", type=int, default=65536)
    given = parser.parse_args()
    calibration = [
        str(given.data / "text" / "wikitext2.valid.txt"),
        f"{given.data / 'text' / 'abc_news.txt'}#0:0.9",
        str(given.data / "text" / "state_union.txt"),
    ]
    texts = {
        "WikiText-2": (str(given.data / "text" / "wikitext2.test.raw.txt"), 64),
        "news": (f"{given.data / 'text' / 'abc_news.txt'}#0.9:1", 16),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    rows = given.out / "rows.json"
    found: dict[str, dict[str, float]] = json.loads(rows.read_text()) if rows.exists() else {}

    def measure(key: str, model: str) -> None:
        found[key] = {
            name: intarsia.evaluate_perplexity(model, text, windows=windows).value
            for name, (text, windows) in texts.items()
        }
        rows.write_text(json.dumps(found, indent=2))
        print(key, {name: round(value, 2) for name, value in found[key].items()}, flush=True)

    if "dense" not in found:
        measure("dense", "demo")
    for name in given.methods:
        run = given.out / name.replace(" --", "-").replace(" ", "-")
        spec = TextSpec(sources=tuple(calibration), tokens=given.tokens)
        with shown():
            intarsia.plan("demo", run, Target(layers=min(given.layers)), method=METHODS[name], text=spec)
        for layers in given.layers:
            if f"{name} {layers}" not in found:
                folder = given.out / "model"
                intarsia.build(run, NewModel(path=folder, overwrite=True), layers=layers)
                measure(f"{name} {layers}", str(folder))
                shutil.rmtree(folder)
    for text in texts:
        print(f"\n{text} (dense {found['dense'][text]:.2f})\n")
        print("| method | " + " | ".join(str(layers) for layers in given.layers) + " |")
        print("|---|" + "---:|" * len(given.layers))
        for name in given.methods:
            cells = [f"{found[f'{name} {layers}'][text]:.1f}" for layers in given.layers]
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
