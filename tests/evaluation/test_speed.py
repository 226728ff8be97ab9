"""Speed by the clock, and what memory is measured to be against what it must be."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from intarsia.architecture.detect import detect
from intarsia.evaluation import speed as module
from intarsia.evaluation.speed import compare_speed, footprint, kv_cache_bytes
from tests import families


def test_numbers_come_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 9 (warm-up), 1, 4 and 2 seconds: the median of the last three counts."""
    seconds = iter([9.0, 1.0, 4.0, 2.0])

    def fake(model: Any, batch: int, prompt_len: int, new_tokens: int) -> tuple[float, float]:
        took = next(seconds)
        return took, took * 2

    monkeypatch.setattr(module, "_round", fake)
    found = compare_speed({"m": families.make_model("llama")}, batch=2, prompt_len=10, new_tokens=5, repeats=3)["m"]
    assert found.prefill_tokens_per_s == pytest.approx(2 * 10 / 2.0)
    assert found.decode_tokens_per_s == pytest.approx(2 * 4 / 4.0)
    assert (found.batch, found.prompt_len, found.new_tokens, found.repeats) == (2, 10, 5, 3)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    models = {name: families.make_model("llama") for name in ("before", "after")}
    names = {id(model): name for name, model in models.items()}
    monkeypatch.setattr(module, "_round", lambda model, *_: seen.append(names[id(model)]) or (1.0, 1.0))
    assert list(compare_speed(models, repeats=2)) == ["before", "after"]
    assert seen == ["before", "after"] * 3


@pytest.mark.parametrize("family", families.FAMILIES)
def test_runs_for_real(family: str) -> None:
    model = families.make_model(family).train()
    steps: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: steps.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    found = compare_speed({"m": model}, batch=2, prompt_len=6, new_tokens=4, repeats=1)["m"]
    assert found.prefill_tokens_per_s > 0 and found.decode_tokens_per_s > 0
    assert steps == [6, 1, 1, 1] * 2
    assert model.training


def test_on_cuda_the_clock_waits_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"wait for {device}"))
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(done)))
    assert module._now(torch.device("cuda", 0)) == 1.0
    assert done == ["wait for cuda:0"]


MB = 1024**2

_GROWTH = """
import numpy as np
import torch
from intarsia.evaluation import speed as memory

MB = 1024**2

def take(megabytes):
    np.ones(megabytes * MB, dtype=np.uint8).sum()  # really touched, and released again

with memory.growth(torch.device("cpu")) as grown:
    take(200)
    take(50)
print(grown.bytes)

take(300)
with memory.growth(torch.device("cpu")) as grown:
    take(100)
print(grown.bytes)
"""


@pytest.mark.exhaustive
def test_growth_is_what_a_block_takes_at_most() -> None:
    """What was needed before does not count.

    In a process of its own: what other tests release meanwhile must not count.
    """
    done = subprocess.run([sys.executable, "-c", _GROWTH], check=True, capture_output=True, text=True)
    most, after_more = (int(line) for line in done.stdout.split())
    assert 195 * MB < most < 260 * MB
    assert 95 * MB < after_more < 160 * MB


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_cache_takes_what_the_config_says(family: str) -> None:
    """Mistral slides in every layer, Qwen3 in two of six, and the prompt is longer than their windows."""
    model = families.make_model(family)
    architecture = detect(model.config.to_dict())
    cache, _ = footprint(model, batch=2, prompt_len=11, new_tokens=4)
    assert cache == kv_cache_bytes(architecture, batch=2, tokens=14, itemsize=4)


def test_cache_by_hand() -> None:
    """Llama: keys and values, 2 sequences, 4 groups of width 4, 14 tokens, 6 layers, 4 bytes."""
    architecture = detect(families.make_model("llama").config.to_dict())
    assert kv_cache_bytes(architecture, batch=2, tokens=14, itemsize=4) == 2 * 2 * 4 * 4 * 14 * 6 * 4
    sliding = detect(families.make_model("mistral").config.to_dict())
    assert kv_cache_bytes(sliding, batch=1, tokens=14, itemsize=2) == 2 * 3 * 8 * 6 * 6 * 2
