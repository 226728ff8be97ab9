from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from intarsia.errors import UserError
from intarsia.evaluation import speed as module
from intarsia.evaluation.speed import compare_speed
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


@pytest.mark.parametrize("changes", [{"batch": 0}, {"prompt_len": 0}, {"new_tokens": 1}, {"repeats": 0}])
def test_impossible_sizes(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="Speed cannot be measured"):
        compare_speed({"m": families.make_model("llama")}, **changes)


def test_on_cuda_the_clock_waits_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"wait for {device}"))
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(done)))
    assert module._now(torch.device("cuda", 0)) == 1.0
    assert done == ["wait for cuda:0"]
