"""What re-running only the layers after a change saves.

CoMe, and CoMe-P with granularity 20 (all ratios on all tokens, no racing), on the demo model, once with kept hidden
states and once made to run the whole model for every step and every ratio; in one run, alternating. Both ways make
the same decisions; that is checked.

    python -m benchmarks cost --data ../shared/data
"""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any

import torch

from intarsia.activations.loop import Path
from intarsia.building.loaded_model import LoadedModel, default_device
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.commands.job import load_tokenizer
from intarsia.data.text import draw
from intarsia.options import TextSpec
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.come import Come
from intarsia.pruning.methods.come_p import ComeP, ComePSettings
from intarsia.pruning.step import Change
from intarsia.recipe.recipe import Variant, identity


class WholeModel(Intermediate):
    """Runs all layers for every change and candidate."""

    def measure(self, start: int = 0, stop: int | None = None) -> None:
        """All layers."""
        super().measure(0, stop)

    def path(self, change: Change) -> Path:
        """All layers."""
        return Path(layers=[*self.placed(0, change.start), *super().path(change).layers])


def climb(resident: LoadedModel, corpus: Any, *, posterior: bool, reuse: bool, target: int) -> dict[str, Any]:
    """Plan down to `target`; cost, time and the layers that came out."""
    whole = identity(Variant(name="base", model="demo"), resident.architecture.n_layers)
    model = (Intermediate if reuse else WholeModel)(resident, corpus, whole.layers)
    planner = (ComeP if posterior else Come)(ComePSettings(granularity=20, spans=1, racing=False))
    started = time.perf_counter()
    model.measure()
    first = model.layer_forwards
    while model.depth > target:
        step = planner.decide(model, target, [])
        assert step is not None
        model.replace(step.start, step.count, step.op)
    model.close()
    return {
        "first": first,
        "layer_forwards": model.layer_forwards - first,
        "seconds": time.perf_counter() - started,
        "layers": model.ops,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--tokens", type=int, nargs=2, default=[8192, 2048], metavar=("COME", "COME_P"))
    parser.add_argument("--layers", type=int, nargs=2, default=[21, 25], metavar=("COME", "COME_P"))
    given = parser.parse_args()
    torch.manual_seed(0)
    checkpoint = open_checkpoint("demo")
    resident = LoadedModel(checkpoint, device=default_device())
    print(f"{torch.get_num_threads()} thread(s), {resident.device}, {resident.model.dtype}\n")
    print("| planner | tokens | layers | | layer-forwards after the first pass | seconds |")
    print("|---|---:|---:|---|---:|---:|")
    for posterior, tokens, target in zip((False, True), given.tokens, given.layers, strict=True):
        text = TextSpec(sources=(str(given.data / "text" / "wikitext2.valid.txt"),), tokens=tokens)
        corpus = draw(text, load_tokenizer(checkpoint)).calibration
        name = "CoMe-P, granularity 20" if posterior else "CoMe"
        runs = {
            reuse: climb(resident, corpus, posterior=posterior, reuse=reuse, target=target) for reuse in (True, False)
        }
        assert runs[True]["layers"] == runs[False]["layers"], "both ways decide the same"
        for reuse, what in ((False, "whole model"), (True, "only the layers after it")):
            run = runs[reuse]
            print(f"| {name} | {tokens} | {target} | {what} | {run['layer_forwards']:.0f} | {run['seconds']:.0f} |")
        shares = [runs[True][key] / runs[False][key] for key in ("layer_forwards", "seconds")]
        print(f"| {name} | | | ratio | {shares[0]:.2f} | {shares[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
