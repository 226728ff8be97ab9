"""Bench: how fast models read and write, and what memory they take, side by side in one run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from intarsia.building.loaded_model import load_model
from intarsia.building.offload import free_bytes
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import Problem, UserError
from intarsia.evaluation.perplexity import Speed
from intarsia.evaluation.speed import Footprint, compare_speed, footprint, kv_cache_bytes
from intarsia.progress import Progress, Silent
from intarsia.stages.setup import device_of, dtype_of

_SHARE_OF_FREE = 0.8


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One model at one batch and prompt length.

    `per_s` are tokens of the whole batch a second; the ratios compare with the first model at the same setting.
    `cache_bytes`: keys and values after the last token, measured; `cache_predicted_bytes`: as the config says.
    `working_bytes`: the most memory beside the weights, cache included; `peak_bytes`: with the weights.
    """

    model: str
    layers: int
    batch: int
    prompt_len: int
    new_tokens: int
    prefill_per_s: float
    prefill_ratio: float
    decode_per_s: float
    decode_ratio: float
    first_token_seconds: float
    weights_bytes: int
    cache_bytes: int
    cache_predicted_bytes: int
    working_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Every model at every setting. `threads` are those that torch computes with on the CPU."""

    device: str
    dtype: str
    threads: int
    repeats: int
    rows: tuple[BenchRow, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def bench(
    *models: str,
    batch: int | Sequence[int] = 1,
    prompt_len: int | Sequence[int] = 256,
    new_tokens: int = 64,
    repeats: int = 5,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure models in turns: medians over `repeats` rounds behind one that warms up.

    Args:
        models: local folders, hub ids, or `demo`; the others are compared with the first.
        batch, prompt_len: one or several each; every combination is measured.
        new_tokens: tokens written after each prompt.

    Raises:
        UserError: a model, a size or a device cannot be used.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    settings = list(itertools.product(_several(batch), _several(prompt_len)))
    where, kind = device_of(device), dtype_of(dtype)
    opened = _opened(models, progress)
    _check(opened, settings, new_tokens, repeats)
    together = sum(each.nbytes for each in opened.values()) < free_bytes(where) * _SHARE_OF_FREE
    if not together and len(opened) > 1:
        progress.say("the models do not fit into memory together: they are measured one after the other")
    measured: dict[tuple[str, int, int], tuple[Speed, Footprint, int]] = {}
    for names in [list(opened)] if together else [[name] for name in opened]:
        loaded = {name: load_model(opened[name], device=where, dtype=kind) for name in names}
        for rows, length in settings:
            sizes = {"batch": rows, "prompt_len": length, "new_tokens": new_tokens}
            speeds = compare_speed(loaded, repeats=repeats, progress=progress, **sizes)
            for name, model in loaded.items():
                measured[name, rows, length] = (speeds[name], footprint(model, **sizes), _weights_bytes(model))
        del loaded
    speed = next(iter(measured.values()))[0]
    return BenchResult(
        device=speed.device,
        dtype=speed.dtype,
        threads=speed.threads,
        repeats=repeats,
        rows=tuple(_rows(opened, settings, measured)),
        seconds=time.perf_counter() - begun,
    )


def _rows(
    opened: Mapping[str, Checkpoint],
    settings: Sequence[tuple[int, int]],
    measured: Mapping[tuple[str, int, int], tuple[Speed, Footprint, int]],
) -> Iterable[BenchRow]:
    first = next(iter(opened))
    for (rows, length), (name, checkpoint) in itertools.product(settings, opened.items()):
        speed, taken, weights = measured[name, rows, length]
        other = measured[first, rows, length][0]
        itemsize = getattr(torch, speed.dtype).itemsize
        tokens = length + speed.new_tokens - 1  # the last token is written, but not read again
        yield BenchRow(
            model=name,
            layers=checkpoint.architecture.n_layers,
            batch=rows,
            prompt_len=length,
            new_tokens=speed.new_tokens,
            prefill_per_s=speed.prefill_tokens_per_s,
            prefill_ratio=speed.prefill_tokens_per_s / other.prefill_tokens_per_s,
            decode_per_s=speed.decode_tokens_per_s,
            decode_ratio=speed.decode_tokens_per_s / other.decode_tokens_per_s,
            first_token_seconds=speed.time_to_first_token_s,
            weights_bytes=weights,
            cache_bytes=taken.cache_bytes,
            cache_predicted_bytes=kv_cache_bytes(checkpoint.architecture, batch=rows, tokens=tokens, itemsize=itemsize),
            working_bytes=taken.working_bytes,
            peak_bytes=weights + taken.working_bytes,
        )


def _opened(models: Sequence[str], progress: Progress) -> dict[str, Checkpoint]:
    """Every model by a name of its own; all that cannot be opened are told at once."""
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    for model in models:
        again = sum(name == model or name.startswith(f"{model} (") for name in opened)
        try:
            opened[f"{model} ({again + 1})" if again else model] = open_checkpoint(model, progress=progress)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if not opened:
        raise UserError.of(where="bench", expected="at least one model", found="none", remedy="Name one.")
    return opened


def _check(
    opened: Mapping[str, Checkpoint], settings: Sequence[tuple[int, int]], new_tokens: int, repeats: int
) -> None:
    problems = [
        Problem(where=where, expected=f"at least {least}", found=str(found), remedy="Choose a larger number.")
        for where, least, found in (
            ("--batch", 1, min((rows for rows, _ in settings), default=0)),
            ("--prompt-len", 1, min((length for _, length in settings), default=0)),
            ("--new-tokens", 2, new_tokens),
            ("--repeats", 1, repeats),
        )
        if found < least
    ]
    needed = max((length for _, length in settings), default=0) + new_tokens
    for name, checkpoint in opened.items():
        most = checkpoint.architecture.config.get("max_position_embeddings")
        if isinstance(most, int) and needed > most:
            problems.append(
                Problem(
                    where=name,
                    expected=f"at most {most} tokens of prompt and answer (max_position_embeddings of the model)",
                    found=str(needed),
                    remedy="Use a smaller --prompt-len or --new-tokens.",
                )
            )
    if problems:
        raise UserError(problems)


def _several(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(dict.fromkeys(value))


def _weights_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
