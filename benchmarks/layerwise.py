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
from functools import partial

import torch

from intarsia.activations.hidden_store import HiddenStore
from intarsia.activations.stream import LayerStream
from intarsia.building.loaded_model import LoadedModel, default_device
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.healing.layerwise import LayerTask, train_layer, trained_names
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.training import Standing, Text

_LAYER = 14
_WARM_UP = 3


def task_of(resident: LoadedModel, settings: LayerwiseSettings, *, steps: int, seq_len: int) -> LayerTask:
    """Training of a layer from random hidden states toward the output of it and the next; a batch is held out."""
    batch = settings.batch_tokens // seq_len
    store = HiddenStore((batch * (steps + 1), seq_len, resident.architecture.width), resident.model.dtype)
    stream = LayerStream(resident.model, resident.architecture)
    with torch.no_grad():
        call, following = stream.calls(torch.zeros(batch, seq_len, dtype=torch.int64), None)[_LAYER : _LAYER + 2]
        for start in range(0, store.shape[0], batch):
            h_BTD = torch.randn(batch, seq_len, resident.architecture.width, dtype=store.dtype).to(resident.device)
            store.put(0, start, h_BTD)
            h_BTD = stream.run(resident.layers[_LAYER], h_BTD, call)
            store.put(1, start, stream.run(resident.layers[_LAYER + 1], h_BTD, following))
    cpu = torch.device("cpu")
    return LayerTask(
        index=_LAYER,
        module=resident.fresh(_LAYER, dict(resident.layers[_LAYER].named_parameters())),
        inputs=partial(store.rows, 0, device=cpu),
        targets=partial(store.rows, 1, device=cpu),
        text=Text(
            ids_NT=torch.zeros(store.shape[:2], dtype=torch.int64),
            mask_NT=None,
            train=store.shape[0] - batch,
            sha256="",
        ),
        calls={batch: call},
        names=trained_names(list(resident.architecture.layer_shapes()), ()),
        settings=settings,
        folder=None,
        device=resident.device,
    )


def bare_pass(task: LayerTask) -> Callable[[], None]:
    """A forward and backward pass of the layer alone, on one batch that is where it is needed."""
    device = task.device
    module = copy.deepcopy(task.module).to(device).requires_grad_(True)
    dtype = next(module.parameters()).dtype
    (size,) = task.calls
    call = task.calls[size].on(device, dtype)
    h_BTD = task.inputs(range(size)).to(device)
    gradient_BTD = torch.randn_like(h_BTD)

    def run() -> None:
        out = module(h_BTD, *call.args, **call.kwargs)
        (out[0] if isinstance(out, tuple) else out).backward(gradient_BTD)
        module.zero_grad(set_to_none=True)

    return run


def measure(task: LayerTask) -> tuple[list[float], list[float]]:
    """Seconds of every step of the training, and of the bare pass after each."""
    steps: list[float] = []
    bare: list[float] = []
    run = bare_pass(task)
    synchronise = torch.cuda.synchronize if task.device.type == "cuda" else lambda: None
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
    train_layer(task, after_step)
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
        steps, bare = measure(task_of(resident, settings, steps=given.steps, seq_len=given.seq_len))
        median = statistics.median(steps), statistics.median(bare)
        name = str(dtype).removeprefix("torch.")
        share = median[1] / median[0]
        print(f"| {name} | {1e3 * median[0]:.0f} | {1e3 * median[1]:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
