"""What `compress` costs at each effort, part by part, in bare forward passes of the model over its calibration tokens.

A bare pass is the model of `transformers` over the same text, in batches of 2,048 tokens, without logits; measured
before and after each compression in the same run. `--publication` adds CoMe planned the way that the publication's code
spends its time (the whole model for every step, sequence by sequence, measured by hooks), beside `plan --method come`.

    python -m benchmarks effort --data ../shared/data
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import intarsia
from intarsia.commands.job import Job
from intarsia.options import Output, Target, TextSpec
from intarsia.progress import shown

PARTS = ("text", "planning", "healing", "building", "evaluation")


@torch.inference_mode()
def bare_pass(model: Any, ids_NT: torch.Tensor) -> float:
    """Seconds of a forward pass over the text."""
    rows = max(1, 2048 // ids_NT.shape[1])
    started = time.perf_counter()
    for start in range(0, len(ids_NT), rows):
        model(input_ids=ids_NT[start : start + rows], use_cache=False, logits_to_keep=1)
    return time.perf_counter() - started


@torch.inference_mode()
def published(model: Any, ids_NT: torch.Tensor, target: int) -> float:
    """Seconds of the passes of the publication's CoMe down to `target` layers.

    Every step runs the whole model, one sequence at a time, with hooks on the inputs of the output projections.
    """
    model, sums = copy.deepcopy(model), dict[Any, torch.Tensor]()
    layers = model.model.layers
    started = time.perf_counter()
    while len(layers) > target:
        sums.clear()

        def add(name: Any, _: Any, given: tuple[torch.Tensor], sums: dict[Any, torch.Tensor] = sums) -> None:
            found = given[0].abs().float().mean(dim=(0, 1))
            sums[name] = sums.get(name, torch.zeros_like(found)) + found

        modules = [part for layer in layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        hooks = [module.register_forward_pre_hook(partial(add, index)) for index, module in enumerate(modules)]
        influence = torch.zeros(len(layers))
        for row in ids_NT:
            states = model(input_ids=row[None], use_cache=False, output_hidden_states=True).hidden_states
            cosines = [torch.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in pairwise(states)]
            influence += 1.0 - torch.stack(cosines)[: len(layers)]
        for hook in hooks:
            hook.remove()
        del layers[int(influence.argmin())]  # which one it is does not change the time
        for index, layer in enumerate(layers):
            layer.self_attn.layer_idx = index
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("out/bench/effort"))
    parser.add_argument("--efforts", nargs="*", default=["quick", "standard"])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--publication", type=int, default=8192, metavar="TOKENS", help="0 leaves it out")
    given = parser.parse_args()
    data = given.data / "text"
    sources = (str(data / "wikitext2.valid.txt"), f"{data / 'abc_news.txt'}#0:0.9", str(data / "state_union.txt"))
    text = TextSpec(sources=sources, tokens=given.tokens)
    job = Job("demo", text)
    ids_NT, model = job.text.calibration.input_ids, job.resident.model
    given.out.mkdir(parents=True, exist_ok=True)

    print(f"| effort | {' | '.join(PARTS)} | all, in passes | seconds of a pass |\n|---|{'---:|' * (len(PARTS) + 2)}")
    for effort in given.efforts:
        shutil.rmtree(given.out / "model.run", ignore_errors=True)
        out = Output(path=given.out / "model", overwrite=True)
        passes = [bare_pass(model, ids_NT)]
        started = time.perf_counter()
        with shown():
            found = intarsia.compress("demo", out, Target(layers=given.layers, effort=effort), text=text)
        seconds = time.perf_counter() - started
        passes.append(bare_pass(model, ids_NT))
        one = statistics.median(passes)
        cells = [f"{found.seconds_by_part[part] / one:.2f}" for part in PARTS]
        print(f"| {effort} | {' | '.join(cells)} | {seconds / one:.1f} | {one:.1f} |", flush=True)

    if given.publication:
        few = TextSpec(sources=sources, tokens=given.publication)
        rows = ids_NT[: given.publication // text.seq_len]
        theirs = published(model, rows, given.layers)
        shutil.rmtree(given.out / "come", ignore_errors=True)
        started = time.perf_counter()
        intarsia.plan("demo", given.out / "come", Target(layers=given.layers), method="come", text=few)
        ours = time.perf_counter() - started
        ratio = theirs / ours
        print(
            f"\nCoMe, {given.publication} tokens: as published {theirs:.0f} s, `plan` {ours:.0f} s, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
