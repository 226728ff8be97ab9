"""Judging what came out against what went in: speed, perplexity, and on what text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch

from intarsia.building.resident import load_model
from intarsia.calibration.corpus import Corpus, load_corpus
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.scan import scan
from intarsia.errors import UserError
from intarsia.evaluation.perplexity import perplexity
from intarsia.evaluation.result import Perplexity
from intarsia.evaluation.speed import compare_speed
from intarsia.progress import Progress
from intarsia.stages.setup import device_of, dtype_of, load_tokenizer

_SHARE_OF_FREE = 0.8
_HELD_OUT = 8  # without an evaluation text, this fraction of the calibration's size is held out to judge by


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is compared before and after. `bytes` are those of the weights; speeds are tokens a second."""

    layers: int
    parameters: int
    bytes: int
    perplexity: Perplexity | None
    prefill_per_s: float
    decode_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = asdict(self)
        if self.perplexity is not None:
            known = self.perplexity.windows > 1  # one window has no scatter
            data["perplexity"] = {"value": self.perplexity.value, "stderr": self.perplexity.stderr if known else None}
        return data


def measured(
    checkpoints: Mapping[str, Checkpoint],
    corpus: Corpus | None,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
) -> dict[str, Measures]:
    """Speed and perplexity of each model; in turns where memory holds them all, else one after the other."""
    together = sum(checkpoint.nbytes for checkpoint in checkpoints.values()) < _free_bytes(device) * _SHARE_OF_FREE
    if not together:
        progress.say("the models do not fit into memory together: their speeds are measured one after the other")
    measures: dict[str, Measures] = {}
    for names in [list(checkpoints)] if together else [[name] for name in checkpoints]:
        models = {name: load_model(checkpoints[name], device=device, dtype=dtype) for name in names}
        speeds = compare_speed(models, progress=progress)
        for name in names:
            judged = None if corpus is None else perplexity(models.pop(name), corpus, progress=progress)
            measures[name] = Measures(
                layers=checkpoints[name].anatomy.n_layers,
                parameters=checkpoints[name].parameters,
                bytes=checkpoints[name].nbytes,
                perplexity=judged,
                prefill_per_s=speeds[name].prefill_tokens_per_s,
                decode_per_s=speeds[name].decode_tokens_per_s,
            )
    return measures


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def held_out_text(
    checkpoint: Checkpoint,
    calibration: str | Sequence[str],
    tokens: int,
    seq_len: int,
    seed: int,
    device: str | None,
    dtype: str | None,
    progress: Progress,
) -> Corpus | None:
    """Text of the calibration's kind that was not calibrated on; None where there is no more."""
    tokenizer = load_tokenizer(checkpoint)
    held_out = max(tokens // seq_len // _HELD_OUT, 1) * seq_len
    if calibration == "self":
        written = load_corpus(
            "self",
            tokenizer,
            tokens=held_out,
            seq_len=seq_len,
            seed=seed + 1,
            model_for_self=lambda: load_model(checkpoint, device=device_of(device), dtype=dtype_of(dtype)),
            self_cache_key=scan(checkpoint, progress),
            progress=progress,
        )
        return replace(written, description="further text that the model wrote itself")
    corpus: Corpus | None = None
    used = load_corpus(calibration, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed).input_ids
    with suppress(UserError):  # the sequences behind those of the calibration: the same sources, seed and order
        corpus = load_corpus(calibration, tokenizer, tokens=tokens + held_out, seq_len=seq_len, seed=seed)
    # A source that is so large that it is only sampled may be sampled otherwise for more tokens.
    if corpus is None or not torch.equal(corpus.input_ids[: len(used)], used):
        progress.say("no perplexity: the calibration text has nothing left to judge by; pass --eval-text")
        return None
    rest = corpus.input_ids[len(used) :]
    mask = None if corpus.mask is None else corpus.mask[len(used) :]
    return Corpus.of(rest, mask=mask, description=f"held-out part of {corpus.description}", documents=corpus.documents)
