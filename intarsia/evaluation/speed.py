"""Tokens a second of a real model, as `transformers` runs it.

Prefill is one forward over the prompts; decode is one token after the other with the library's own cache, greedily.
Each is run once to warm up, then several times; the median counts. Models that are compared take turns within one run,
so that whatever else the machine does meets all of them. CUDA keeps the time itself, by events in its own queue.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import UserError
from intarsia.evaluation.memory import cache_bytes, growth
from intarsia.evaluation.result import Speed
from intarsia.progress import Progress, Silent


def speed(
    model: torch.nn.Module,
    *,
    batch: int = 1,
    prompt_len: int = 256,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Progress | None = None,
) -> Speed:
    """Speed of one model, where it is and in its own dtype; see `compare_speed`."""
    only = {"model": model}
    return compare_speed(
        only, batch=batch, prompt_len=prompt_len, new_tokens=new_tokens, repeats=repeats, progress=progress
    )["model"]


def compare_speed(
    models: Mapping[str, torch.nn.Module],
    *,
    batch: int = 1,
    prompt_len: int = 256,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Speed of several models, measured in turns.

    Args:
        models: causal language models of `transformers`, by name.
        batch: sequences at once.
        prompt_len: tokens a prompt (random ones: their values do not matter for the time).
        new_tokens: tokens that are written after each prompt; the first comes out of the prefill and is not counted
            in decode.
        repeats: measured rounds after one that is not counted.
        progress: advances by rounds of a model.

    Raises:
        UserError: a size is impossible.
    """
    if min(batch, prompt_len, repeats) < 1 or new_tokens < 2:
        raise UserError.of(
            where="speed",
            expected="batch, prompt_len and repeats of at least 1, and at least 2 new tokens",
            found=f"batch {batch}, prompt_len {prompt_len}, repeats {repeats}, new_tokens {new_tokens}",
            remedy="Choose larger numbers.",
        )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    training = {name: model.training for name, model in models.items()}
    try:
        with (progress or Silent()).task("speed", total=(repeats + 1) * len(models)) as task:
            for turn in range(repeats + 1):
                for name, model in models.items():
                    task.note(name)
                    measured = _round(model.eval(), batch, prompt_len, new_tokens)
                    if turn > 0:  # the first round warms up
                        times[name].append(measured)
                    task.advance()
    finally:
        for name, model in models.items():
            model.train(training[name])
    return {
        name: Speed(
            prefill_tokens_per_s=batch * prompt_len / statistics.median(prefill for prefill, _ in times[name]),
            time_to_first_token_s=statistics.median(prefill for prefill, _ in times[name]),
            decode_tokens_per_s=batch * (new_tokens - 1) / statistics.median(decode for _, decode in times[name]),
            batch=batch,
            prompt_len=prompt_len,
            new_tokens=new_tokens,
            device=_device_name(_weight(model).device),
            dtype=str(_weight(model).dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            repeats=repeats,
        )
        for name, model in models.items()
    }


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that writing takes beside the weights: `cache_bytes` for keys and values at its end, `working_bytes` for
    everything at its worst (cache included)."""

    cache_bytes: int
    working_bytes: int


def footprint(model: torch.nn.Module, *, batch: int, prompt_len: int, new_tokens: int) -> Footprint:
    """What a model takes beside its weights; run it once before, so that all weights have been read."""
    with growth(_weight(model).device) as grown:
        cache = _write(model.eval(), batch, prompt_len, new_tokens, lambda: None)
        held = cache_bytes(cache)
    return Footprint(cache_bytes=held, working_bytes=grown.bytes)


def _round(model: Any, batch: int, prompt_len: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill, and of the decoding behind it."""
    clock = _Clock(_weight(model).device)
    _write(model, batch, prompt_len, new_tokens, clock.mark)
    prefill, decode = clock.spans()
    return prefill, decode


def _write(model: Any, batch: int, prompt_len: int, new_tokens: int, mark: Callable[[], None]) -> Any:
    """Read random prompts and write after them; `mark` is called before, between and after. Gives the cache."""
    from transformers import DynamicCache

    chance = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (batch, prompt_len), generator=chance).to(_weight(model).device)
    cache = DynamicCache(config=model.config)

    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    with torch.inference_mode():
        mark()
        next_B1 = step(ids_BT)
        mark()
        for _ in range(new_tokens - 1):
            next_B1 = step(next_B1)
        mark()
    return cache


class _Clock:
    """Times between marks, on the clock of the device that does the work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        self._wait()

    def mark(self) -> None:
        """Now: on CUDA when the work queued so far is done, elsewhere after waiting for it."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            self._wait()
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds between each mark and the next."""
        self._wait()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [first.elapsed_time(second) / 1000.0 for first, second in pairs]
        return [second - first for first, second in pairs]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _weight(model: torch.nn.Module) -> Tensor:
    return next(model.parameters())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
