"""`intarsia bench`: speed and memory of several models in one run, or of a model with a draft."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from intarsia.commands.evaluate import check_one_device
from intarsia.errors import Problems, at_least, check
from intarsia.flags import Flag, Result
from intarsia.options import AnswerSpec, Runtime
from intarsia.progress import current

if TYPE_CHECKING:
    from intarsia.commands.job import Job
    from intarsia.evaluation.agreement import Asked
    from intarsia.evaluation.results import Speed
    from intarsia.evaluation.speed import Drafting

_SHARE_OF_FREE = 0.8
_PROMPTS = 8  # for a draft


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One model at one batch size and prompt length. Ratios are to the first model at the same setting."""

    model: str
    layers: int
    batch: int
    prompt_len: int
    new_tokens: int
    # Tokens per second of the whole batch.
    prefill_per_s: float
    prefill_ratio: float
    decode_per_s: float
    decode_ratio: float
    first_token_seconds: float
    weights_bytes: int
    # Keys and values after the last token, measured.
    cache_bytes: int
    # The same, computed from the config.
    cache_predicted_bytes: int | None
    # Peak memory beside the weights, including the cache.
    working_bytes: int
    # Including the weights.
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class BenchResult(Result):
    """Every model at every setting."""

    device: str
    dtype: str
    # Number of CPU threads of torch.
    threads: int
    repeats: int
    rows: tuple[BenchRow, ...]
    # The measures of assisted generation, and the draft; None without one.
    draft: Drafting | None = None
    draft_model: str | None = None
    seconds: float


def bench(
    *models: Annotated[
        str,
        Flag(metavar="MODEL", help="Local folders, hub ids, or `demo`; the first is the reference."),
    ],
    batch: Annotated[
        tuple[int, ...] | int,
        Flag(metavar="N", help="Sequences per batch; every value is combined with every --prompt-len."),
    ] = (1,),
    prompt_len: Annotated[tuple[int, ...] | int, Flag(metavar="N", help="Tokens per prompt.")] = (256,),
    new_tokens: Annotated[int, Flag(metavar="N", help="Tokens generated after each prompt.")] = 64,
    repeats: Annotated[int, Flag(metavar="N", help="Measured rounds; the median is reported.")] = 5,
    draft: Annotated[
        str | None,
        Flag(metavar="MODEL", help="Measure assisted generation with this draft model: acceptance, and speed-up."),
    ] = None,
    prompts: Annotated[
        str | None,
        Flag(metavar="FILE", help="Prompts for --draft: one a line, or conversations (default: MODEL writes 8)."),
    ] = None,
    runtime: Runtime = Runtime(),
) -> BenchResult:
    """Measure tokens per second of prefill and decoding, time to the first token, and memory.

    Models are measured in turns, after one warm-up round. --draft measures assisted generation of transformers with a
    draft model.

    Raises:
        UserError: a model, a size or a device cannot be used.
    """
    from intarsia.building.loaded_model import load_model
    from intarsia.building.offload import free_bytes
    from intarsia.evaluation.speed import compare_speed, footprint

    started = time.perf_counter()
    check_one_device(runtime)
    jobs = _opened(models, runtime)
    assistant = None if draft is None else _draft(draft, list(jobs.values()), runtime)
    alone = prompts is not None and draft is None
    check((not alone, "--prompts is given without --draft.", "Leave it out, or give --draft."))
    first = next(iter(jobs.values()))
    asked = None if assistant is None else _asked(first, assistant, prompts, new_tokens)
    settings = list(itertools.product(_several(batch), _several(prompt_len)))
    _check(jobs, settings, new_tokens, repeats)
    device, dtype = first.device, first.dtype
    together = sum(job.checkpoint.nbytes for job in jobs.values()) < free_bytes(device) * _SHARE_OF_FREE
    if not together and len(jobs) > 1:
        current().say("the models do not fit into memory together, so each is measured on its own")

    # By model and setting: its speed, the bytes of its cache, those of everything beside the weights, and theirs.
    measured: dict[tuple[str, int, int], tuple[Speed, int, int, int]] = {}
    for names in [list(jobs)] if together else [[name] for name in jobs]:
        loaded = {name: load_model(jobs[name].checkpoint, device=device, dtype=dtype) for name in names}
        for rows, length in settings:
            sizes = {"batch": rows, "prompt_len": length, "new_tokens": new_tokens}
            speeds = compare_speed(loaded, repeats=repeats, **sizes)
            for name, model in loaded.items():
                weights = sum(parameter.nbytes for parameter in model.parameters())
                measured[name, rows, length] = (speeds[name], *footprint(model, **sizes), weights)
        del loaded

    speed = next(iter(measured.values()))[0]
    return BenchResult(
        device=speed.device,
        dtype=speed.dtype,
        threads=speed.threads,
        repeats=repeats,
        rows=tuple(_rows(jobs, settings, measured)),
        draft=None if assistant is None or asked is None else _drafting(first, assistant, asked),
        draft_model=None if assistant is None else assistant.model,
        seconds=time.perf_counter() - started,
    )


def _draft(name: str, jobs: Sequence[Job], runtime: Runtime) -> Job:
    """The draft, checked against its model."""
    from intarsia.commands.job import Job, check_same_tokenizer

    check((len(jobs) == 1, "--draft is given with several models.", "Name one model."))
    found = Job(name, runtime=runtime)
    check_same_tokenizer(jobs[0], found)
    return found


def _asked(job: Job, draft: Job, prompts: str | None, new_tokens: int) -> Asked:
    from intarsia.evaluation.agreement import Asked

    spec = AnswerSpec(answers=_PROMPTS, prompts=prompts, answer_tokens=new_tokens)
    found = Asked.of(spec, job.tokenizer, *(each.checkpoint.architecture.config for each in (job, draft)))
    assert found is not None
    return found


def _drafting(job: Job, draft: Job, asked: Asked) -> Drafting:
    from intarsia.building.loaded_model import load_model
    from intarsia.evaluation.speed import assisted

    model, small = (load_model(each.checkpoint, device=job.device, dtype=job.dtype) for each in (job, draft))
    prompts = asked.ready(model, seed=0, key=job.sha256)
    return assisted(model, small, prompts.ids, new_tokens=asked.answer_tokens, enders=sorted(prompts.enders))


def _rows(
    jobs: Mapping[str, Job],
    settings: Sequence[tuple[int, int]],
    measured: Mapping[tuple[str, int, int], tuple[Speed, int, int, int]],
) -> Iterable[BenchRow]:
    import torch

    from intarsia.evaluation.speed import kv_cache_bytes

    first = next(iter(jobs))
    for (rows, length), (name, job) in itertools.product(settings, jobs.items()):
        architecture = job.checkpoint.architecture
        speed, cache, working, weights = measured[name, rows, length]
        other = measured[first, rows, length][0]
        itemsize = getattr(torch, speed.dtype).itemsize
        tokens = length + speed.new_tokens - 1  # the last token is generated, but not read
        yield BenchRow(
            model=name,
            layers=architecture.n_layers,
            batch=rows,
            prompt_len=length,
            new_tokens=speed.new_tokens,
            prefill_per_s=speed.prefill_tokens_per_s,
            prefill_ratio=speed.prefill_tokens_per_s / other.prefill_tokens_per_s,
            decode_per_s=speed.decode_tokens_per_s,
            decode_ratio=speed.decode_tokens_per_s / other.decode_tokens_per_s,
            first_token_seconds=speed.time_to_first_token_s,
            weights_bytes=weights,
            cache_bytes=cache,
            cache_predicted_bytes=kv_cache_bytes(architecture, batch=rows, tokens=tokens, itemsize=itemsize),
            working_bytes=working,
            peak_bytes=weights + working,
        )


def _opened(models: Sequence[str], runtime: Runtime) -> dict[str, Job]:
    """Every model by a unique name."""
    from intarsia.commands.job import Job

    check((bool(models), "No model is given.", "Name one."))
    jobs, problems = dict[str, Job](), Problems()
    for model in models:
        again = sum(name == model or name.startswith(f"{model} (") for name in jobs)
        with problems:
            jobs[f"{model} ({again + 1})" if again else model] = Job(model, runtime=runtime)
    problems.raise_any()
    return jobs


def _check(jobs: Mapping[str, Job], settings: Sequence[tuple[int, int]], new_tokens: int, repeats: int) -> None:
    rows, lengths = ([setting[at] for setting in settings] for at in (0, 1))
    needed = max(lengths, default=0) + new_tokens
    positions = {name: job.checkpoint.architecture.config.get("max_position_embeddings") for name, job in jobs.items()}
    few = {name: most for name, most in positions.items() if isinstance(most, int) and most < needed}
    larger = "Give a larger one."
    check(
        *at_least(1, larger, batch=min(rows, default=0), prompt_len=min(lengths, default=0), repeats=repeats),
        *at_least(2, larger, new_tokens=new_tokens),
        *(
            (False, f"Prompt and answer have {needed} tokens; {name} has {most} positions.", "Give fewer tokens.")
            for name, most in few.items()
        ),
    )


def _several(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(dict.fromkeys(value))
