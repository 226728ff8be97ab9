"""How much of the bare layer's speed layerwise training has.

One layer of the demo model, all its tensors trained. A step of the training (data from the store, forward, loss,
backward, clipping, AdamW, float32 master copy) and a forward and backward pass of the bare layer on a batch of the same
size take turns; medians of both in one run.

    python -m benchmarks layerwise
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch

from intarsia.activations.hidden_store import MemoryBudget
from intarsia.building.loaded_model import LoadedModel, default_device
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.healing.layerwise import LayerTraining, Work
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.training import Standing, Text
from intarsia.progress import Task
from intarsia.recipe.recipe import Variant, identity

_LAYER = 14
_WARM_UP = 3


def training_of(resident: LoadedModel, settings: LayerwiseSettings, *, steps: int, seq_len: int) -> LayerTraining:
    """Training of a layer toward the output of the next one, which is dropped; a batch is held out."""
    whole = identity(Variant(name="base", model="demo"), resident.architecture.n_layers)
    recipe = whole.with_layers([*whole.layers[: _LAYER + 1], *whole.layers[_LAYER + 2 :]])
    batch = settings.batch_tokens // seq_len
    ids_NT = torch.randint(resident.architecture.vocabulary, (batch * (steps + 1), seq_len))
    text = Text(ids_NT=ids_NT, mask_NT=None, train=batch * steps)
    work = Work(recipe, resident, resident, text, settings, None, MemoryBudget())
    work.reach(_LAYER, {}, Task())
    return LayerTraining(work, _LAYER)


def bare_pass(training: LayerTraining) -> Callable[[], None]:
    """A forward and backward pass of the layer alone, on one batch that is where it is needed."""
    module = copy.deepcopy(training.module).requires_grad_(True)
    size = training.schedule.batch
    call, h_BTD = training.calls[size], training.inputs(range(size)).to(training.device)
    gradient_BTD = torch.randn_like(h_BTD)

    def run() -> None:
        out = module(h_BTD, *call.args, **call.kwargs)
        (out[0] if isinstance(out, tuple) else out).backward(gradient_BTD)
        module.zero_grad(set_to_none=True)

    return run


def measure(training: LayerTraining) -> tuple[list[float], list[float]]:
    """Seconds of every step of the training, and of the bare pass after each."""
    steps: list[float] = []
    bare: list[float] = []
    run = bare_pass(training)
    synchronise = torch.cuda.synchronize if training.device.type == "cuda" else lambda: None
    started = 0.0

    def after_step(standing: Standing, loss: float) -> None:
        nonlocal started
        synchronise()
        ended = time.perf_counter()
        steps.append(ended - started)
        run()
        synchronise()
        started = time.perf_counter()
        bare.append(started - ended)

    started = time.perf_counter()
    training.run(after_step)
    return steps[_WARM_UP:], bare[_WARM_UP:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=33)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=LayerwiseSettings().batch_tokens)
    given = parser.parse_args()
    checkpoint = open_checkpoint("demo")
    device = default_device()
    print(f"{torch.get_num_threads()} thread(s), {device}, {given.batch_tokens} tokens a step\n")
    print("| dtype | training step, ms | bare forward and backward, ms | speed of the bare layer kept |")
    print("|---|---:|---:|---:|")
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        resident = LoadedModel(checkpoint, device=device, dtype=dtype)
        settings = LayerwiseSettings(batch_tokens=given.batch_tokens, evaluations=1)
        steps, bare = measure(training_of(resident, settings, steps=given.steps, seq_len=given.seq_len))
        median = statistics.median(steps), statistics.median(bare)
        name = str(dtype).removeprefix("torch.")
        share = median[1] / median[0]
        print(f"| {name} | {1e3 * median[0]:.0f} | {1e3 * median[1]:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
