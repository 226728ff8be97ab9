"""Speed of models, alone and with a draft, and memory use of generation.

A draft proposes tokens, and the model checks them in one pass; tokens that it would have generated itself are accepted.
Passes are counted by hooks on the modules, independently of transformers.
"""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from intarsia.architecture.spec import Architecture
from intarsia.checkpoint.files import give_back
from intarsia.errors import UserError
from intarsia.evaluation.likelihood import evaluating
from intarsia.evaluation.results import Speed
from intarsia.progress import current

_SAMPLE_S = 0.005
_CACHED = ("keys", "values", "conv_states", "recurrent_states")


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Growth:
    """The result of `growth`: `bytes` is valid after its block."""

    bytes: int = 0


@contextmanager
def growth(device: torch.device) -> Iterator[Growth]:
    """Measure the largest rise of memory while the block runs.

    On CUDA this is the memory of tensors. On the CPU it is the resident memory of this process, sampled every few
    milliseconds, after unused memory is returned to the system; it includes other threads.
    """
    found = Growth()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = int(torch.cuda.max_memory_allocated(device) - before)
        return
    gc.collect()
    give_back()  # unused memory would hide new allocations
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        found.bytes = max(found.bytes, process.memory_info().rss - before)

    def watch() -> None:
        while not done.wait(_SAMPLE_S):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        look()


def kv_cache_bytes(architecture: Architecture, *, batch: int, tokens: int, itemsize: int) -> int | None:
    """Bytes of keys and values of `tokens` tokens, by the config; a sliding layer holds its window less one. None if
    the layers' heads are unknown."""
    if architecture.removal_only:
        return None
    window = architecture.config.get("sliding_window")
    kinds = architecture.layer_types
    if kinds is None:  # one kind for all: sliding, unless the config switches it off
        slides = window is not None and architecture.config.get("use_sliding_window", True)
        kinds = ("sliding_attention" if slides else "full_attention",) * architecture.n_layers
    held = [min(tokens, int(window or 0) - 1) if kind.startswith("sliding_attention") else tokens for kind in kinds]
    heads = architecture.n_query_heads if architecture.family.caches_query_heads else architecture.n_kv_heads
    return 2 * batch * heads * architecture.head_dim * itemsize * sum(held)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of `transformers`."""
    held = (getattr(layer, name, None) for layer in cache.layers for name in _CACHED)
    parts = (part for each in held for part in (each.values() if isinstance(each, dict) else (each,)))
    return sum(tensor.nbytes for tensor in parts if isinstance(tensor, torch.Tensor))


def compare_speed(
    models: Mapping[str, torch.nn.Module],
    *,
    batch: int = 1,
    prompt_len: int = 256,
    new_tokens: int = 32,
    repeats: int = 3,
) -> dict[str, Speed]:
    """Speed of several models, measured in turns.

    Args:
        prompt_len: tokens per prompt (random, because values do not affect the time).
        new_tokens: tokens to generate after each prompt; the first comes from the prefill and does not count for
            decoding.
        repeats: measured rounds after one warm-up round.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with ExitStack() as modes, current().task("speed", total=(repeats + 1) * len(models)) as task:
        for model in models.values():
            modes.enter_context(evaluating(model))
        for turn in range(repeats + 1):
            for name, model in models.items():
                task.note(name)
                measured = _round(model, batch, prompt_len, new_tokens)
                if turn > 0:  # the first round is a warm-up
                    times[name].append(measured)
                task.advance()
    medians = {name: [statistics.median(each) for each in zip(*found, strict=True)] for name, found in times.items()}
    return {
        name: Speed(
            prefill_tokens_per_s=batch * prompt_len / medians[name][0],
            time_to_first_token_s=medians[name][0],
            decode_tokens_per_s=batch * (new_tokens - 1) / medians[name][1],
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


def footprint(model: torch.nn.Module, *, batch: int, prompt_len: int, new_tokens: int) -> tuple[int, int]:
    """Bytes that writing takes beside the weights: of keys and values at its end, and of everything at its worst.

    Run the model once before, so that all weights have been read.
    """
    with growth(_weight(model).device) as grown:
        cache = _write(model.eval(), batch, prompt_len, new_tokens, lambda: None)
        held = cache_bytes(cache)
    return held, grown.bytes


def _round(model: Any, batch: int, prompt_len: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill, and of the decoding after it."""
    device, marks = _weight(model).device, list[float]()
    _write(model, batch, prompt_len, new_tokens, lambda: marks.append(_now(device)))
    start, read, end = marks
    return read - start, end - read


def _write(model: Any, batch: int, prompt_len: int, new_tokens: int, mark: Callable[[], None]) -> Any:
    """Prefill random prompts and decode; `mark` is called before, between and after. Return the cache."""
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


def _now(device: torch.device) -> float:
    """The time when the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _weight(model: torch.nn.Module) -> Tensor:
    return next(model.parameters())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Assisted generation compared with plain, over all prompts."""

    prompts: int
    # Number of tokens generated with the draft.
    tokens: int
    # Share of the draft's proposals that were accepted.
    acceptance: float
    # Tokens per pass of the model; 1 without a draft.
    tokens_per_pass: float
    # Tokens per second, medians over prompts.
    plain_per_s: float
    assisted_per_s: float
    # Speed-up of assisted over plain generation.
    speedup: float
    # Share of prompts with exactly the same greedy tokens; rounding may decide between nearly equal tokens.
    same_output: float


def assisted(
    model: Any, draft: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int, enders: Sequence[int]
) -> Drafting:
    """Answer every prompt with and without the draft, in turns, after one warm-up prompt.

    Raises:
        UserError: transformers cannot generate with this draft.
    """
    plain_s, assisted_s, same, written, passes, proposed = [], [], 0, 0, 0, 0
    with evaluating(model), evaluating(draft), current().task("assisted generation", 1 + len(prompts)) as task:
        for number, prompt in enumerate([prompts[0], *prompts]):
            plain, seconds = _written(model, prompt, new_tokens, enders)
            with _calls(model) as ours, _calls(draft) as theirs:
                helped, helped_seconds = _written(model, prompt, new_tokens, enders, assistant_model=draft)
            task.advance()
            if number == 0 or not (plain and helped):  # the first one is a warm-up
                continue
            plain_s.append(len(plain) / seconds)
            assisted_s.append(len(helped) / helped_seconds)
            same += plain == helped
            written += len(helped)
            passes += len(ours)
            proposed += len(theirs)
    if not written:
        raise UserError("The model answers none of the prompts.", "Give other --prompts.")
    speeds = statistics.median(plain_s), statistics.median(assisted_s)
    return Drafting(
        prompts=len(plain_s),
        tokens=written,
        acceptance=max(0, written - passes) / max(1, proposed),
        tokens_per_pass=written / passes,
        plain_per_s=speeds[0],
        assisted_per_s=speeds[1],
        speedup=speeds[1] / speeds[0],
        same_output=same / len(plain_s),
    )


def _written(
    model: Any, prompt: Sequence[int], new_tokens: int, enders: Sequence[int], **how: Any
) -> tuple[list[int], float]:
    """A model's greedy answer to a prompt, and its time in seconds."""
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    settings: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": new_tokens,
    }
    settings |= {"eos_token_id": list(enders) or None, "pad_token_id": enders[0] if enders else 0}
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **how)
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
    except (ValueError, NotImplementedError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"transformers cannot generate with this draft: {said}.", "Leave --draft out.") from error
    return found[0, ids.shape[1] :].tolist(), time.perf_counter() - started


@contextmanager
def _calls(model: Any) -> Iterator[list[None]]:
    """A list that gets an entry for every forward pass of a model."""
    found: list[None] = []
    hook = model.register_forward_hook(lambda *_: found.append(None))
    try:
        yield found
    finally:
        hook.remove()
