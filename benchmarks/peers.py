"""ReplaceMe, Prune&Comp, LinearPatch and the closed form on the same pruned models: perplexity on two texts.

The first two and the closed form are heal stages, and rows of a comparison. LinearPatch (Chen et al., arXiv 2505.24680)
is added to it here: a matrix P = Q diag(d) Q^t between the layers before and after a dropped run, with Q the Hadamard
matrix over sqrt(D) and d_c = E[E_t|(H^b Q)_c| / E_t|(H^a Q)_c|]. No stock checkpoint has such a matrix, so it is
measured in memory, as an upper bound, and never written. It is the form without training; of several runs each patch is
measured on the original. A stopped benchmark resumes.

    python -m benchmarks peers --data ../shared/data -o out/bench/peers
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import intarsia
from intarsia import progress
from intarsia.building.materialize import assembled
from intarsia.commands.compare import CompareEval, Entrants
from intarsia.commands.job import Job
from intarsia.evaluation.perplexity import eval_corpus, perplexity
from intarsia.healing.pipeline import HealContext
from intarsia.healing.stages.compensate import magnitude_ratios
from intarsia.options import ModelRef, Runtime, TextSpec
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.comparison import DENSE, ROWS, as_markdown, load
from intarsia.run_dir import RunDir

HEALS = ("none", "replaceme", "prune-comp", "closed-form")
PATCH = "linear-patch"
_NOTE = "no stock checkpoint: measured in memory"


def hadamard(size: int) -> Tensor:
    """A Hadamard matrix (entries 1 and -1, orthogonal rows), float64: Sylvester's doubling of one by Paley.

    Raises:
        ValueError: neither construction gives one of this size.
    """
    if size <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size % 4:
        raise ValueError(f"no Hadamard matrix of size {size} is known here")
    prime = next((p for p in (size - 1, size // 2 - 1) if _is_prime(p) and p % 4 == (3 if p == size - 1 else 1)), None)
    if prime is None or size.bit_count() == 1:
        return torch.kron(hadamard(2), hadamard(size // 2))
    squares = {number * number % prime for number in range(1, prime)}
    characters = [0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))]
    core = torch.tensor(
        [[characters[(row - column) % prime] for column in range(prime)] for row in range(prime)], dtype=torch.float64
    )
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    eye = torch.eye(prime + 1, dtype=torch.float64)
    bordered[0, 0], bordered[1:, 1:] = 0.0, core
    if prime == size - 1:  # minus one modulo four: skew
        bordered[1:, 0] = -1.0
        return bordered + eye
    plus, minus = (torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(bordered, plus) + torch.kron(eye, minus)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def patched(context: HealContext, recipe: Recipe) -> PreTrainedModel:
    """The recipe's model with a patch after every layer that stands for dropped ones."""
    size = context.resident.architecture.width
    rotation_DD = hadamard(size) / math.sqrt(size)
    ratios, context.facts["forwards"] = magnitude_ratios(context, recipe, rotation_DD)
    model = assembled(recipe, context.resident)
    layers = model.get_submodule(context.resident.architecture.family.modules.layers)
    assert isinstance(layers, nn.ModuleList)
    for index, scales_D in ratios.items():
        patch_DD = (rotation_DD * scales_D) @ rotation_DD.T

        def through(_: nn.Module, args: Any, out: Any, patch_DD: Tensor = patch_DD) -> Any:
            h_BTD = out[0] if isinstance(out, tuple) else out
            h_BTD = (h_BTD.float() @ patch_DD.to(h_BTD.device).float()).to(h_BTD.dtype)
            return (h_BTD, *out[1:]) if isinstance(out, tuple) else h_BTD

        layers[index].register_forward_hook(through)
    return model


def main() -> None:
    """Compare, add the patched models to the table, and print it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("-o", "--out", type=Path, default=Path("out/bench/peers"))
    options.add_argument("--model", default="demo")
    options.add_argument("--methods", nargs="+", default=["angular", "sleb[criterion=loss]"])
    options.add_argument("--layers", type=int, nargs="+", default=[27, 25, 23, 21])
    options.add_argument("--heal", nargs="+", default=list(HEALS))
    options.add_argument("--tokens", type=int, default=65536)
    options.add_argument("--eval-windows", type=int, nargs=2, default=[64, 16], metavar=("WIKITEXT", "NEWS"))
    given = options.parse_args()
    text = given.data / "text"
    spec = TextSpec(
        sources=(str(text / "wikitext2.valid.txt"), f"{text / 'abc_news.txt'}#0:0.9", str(text / "state_union.txt")),
        tokens=given.tokens,
    )
    sources = {"WikiText-2": str(text / "wikitext2.test.raw.txt"), "news": f"{text / 'abc_news.txt'}#0.9:1"}
    entrants = Entrants(methods=tuple(given.methods), layers=tuple(given.layers), heal=tuple(given.heal))
    evaluation = CompareEval(
        text=tuple(f"{name}={source}" for name, source in sources.items()), windows=tuple(given.eval_windows)
    )
    with progress.shown():
        intarsia.compare(given.model, given.out, entrants, evaluation, text=spec)
        job, run = Job(ModelRef(model=given.model), spec, Runtime()), RunDir(given.out)
        windows = zip(sources.items(), given.eval_windows, strict=True)
        texts = {
            name: eval_corpus(source, job.tokenizer, seq_len=spec.seq_len, windows=count)
            for (name, source), count in windows
        }
        rows = load(given.out).rows
        done = {row.key for row in rows}
        for row in rows:
            if row.method == DENSE or row.heal != "none" or not row.recipe or (*row.key[:2], PATCH) in done:
                continue
            recipe = schema.load(given.out / row.recipe)
            with run.opened():
                context = HealContext(
                    run=run,
                    variants={recipe.base: job.checkpoint},
                    load=lambda: job.resident,
                    device=job.device,
                    calibration=job.text.calibration,
                    selection=job.text.selection,
                )
                model = patched(context, recipe)
                found = {name: perplexity(model, corpus) for name, corpus in texts.items()}
                measured = {
                    name: {"value": each.value, "nll": each.nll, "stderr": each.stderr, "windows": each.windows}
                    for name, each in found.items()
                }
                more = {"heal": PATCH, "recipe": None, "note": _NOTE, "heal_forwards": context.facts["forwards"]}
                run.log(Path(ROWS).stem).append({**asdict(row), **more, "perplexity": measured})
        intarsia.compare(given.model, given.out, entrants, evaluation, text=spec)  # the table, with the new rows
    print(as_markdown(load(given.out)))


if __name__ == "__main__":
    main()
