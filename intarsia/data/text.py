"""A calibration corpus from what a user calls it: files, datasets on the hub, or text that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from intarsia.data.corpus import Corpus, tokenize
from intarsia.data.self_text import self_corpus
from intarsia.data.sources import documents
from intarsia.errors import UserError
from intarsia.progress import Progress, Silent

_MOST_READ = 16 * 1024 * 1024  # bytes of one source that are tokenised at most (a few seconds), unless more is needed
_BYTES_A_TOKEN = 32  # generous: enough text for the tokens wanted, also where tokens are long


def load_corpus(
    spec: str | Sequence[str],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    model_for_self: Callable[[], Any] | None = None,
    self_cache_key: str | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """A calibration corpus from one spec or several, equal parts of each, mixed evenly.

    With files, asking for more tokens gives the same sequences first and then others, up to half a million tokens a
    source (behind that, another part of a large file may be read). Text that a model writes has no such order.

    Args:
        spec: see `intarsia.data.sources`; `self` is text that the model writes itself. Several are a list,
            or separated by commas.
        tokenizer: the model's.
        tokens: how many, over all sources.
        seq_len: tokens a sequence.
        seed: decides which parts of the sources are taken, and what the model writes.
        model_for_self: gives the model that writes, for `self`; only called when the text is not cached.
        self_cache_key: identifies that model's weights (their hash); without it nothing is cached.
        progress: shown while text is read and written.

    Raises:
        UserError: something is wrong with a source, or the sources are too short.
    """
    progress = progress or Silent()
    specs = _specs(spec)
    total = tokens // max(seq_len, 1)
    if total < len(specs):
        raise UserError.of(
            where=f"calibration text {', '.join(specs)}",
            expected=f"at least one sequence of {seq_len} tokens for each of {len(specs)} sources",
            found=f"{tokens} tokens, which is {total} sequences",
            remedy="Ask for more tokens, shorter sequences, or fewer sources.",
        )
    parts = []
    with progress.task("calibration text", total=len(specs)) as task:
        for i, one in enumerate(specs):
            task.note(one)
            share = (total // len(specs) + (i < total % len(specs))) * seq_len
            if one == "self":
                parts.append(_self(model_for_self, self_cache_key, tokenizer, share, seq_len, seed, progress))
            else:
                limit = max(_MOST_READ, _BYTES_A_TOKEN * share)
                texts = documents(one, limit_bytes=limit, seed=seed)
                parts.append(
                    tokenize(texts, tokenizer, tokens=share, seq_len=seq_len, seed=seed, shuffle=True, description=one)
                )
            task.advance()
    # Sources take turns, so that every stretch of the corpus holds equal parts of each.
    order = sorted((i, p) for p, part in enumerate(parts) for i in range(len(part)))
    ids = torch.stack([parts[p].input_ids[i] for i, p in order])
    return Corpus.of(ids, description=", ".join(specs), documents=sum(part.documents for part in parts))


def _specs(spec: str | Sequence[str]) -> list[str]:
    if not isinstance(spec, str):
        specs = list(spec)
    else:
        specs = [spec] if Path(spec).is_file() else [one.strip() for one in spec.split(",")]
    if not specs or not all(specs):
        raise UserError.of(
            where="calibration text",
            expected="one source, or several separated by commas",
            found=repr(spec),
            remedy="Pass a text file, hub:DATASET[/CONFIG]:SPLIT:COLUMN, or self.",
        )
    return specs


def _self(
    model: Callable[[], Any] | None,
    key: str | None,
    tokenizer: Any,
    tokens: int,
    seq_len: int,
    seed: int,
    progress: Progress,
) -> Corpus:
    if model is None:
        raise UserError.of(
            where="calibration text self",
            expected="a model that writes the text",
            found="none",
            remedy="Pass a text file, or the model (model_for_self).",
        )
    return self_corpus(model, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed, cache_key=key, progress=progress)
