"""Calibration text that the model writes itself, so that none is needed.

An instruct model writes whole conversations in its chat template: first the user's turn, for which it is given the
template's user header and nothing else (as in Magpie, arXiv 2406.08464), then the answer, then the next user turn.
A base model writes documents from its BOS or EOS token on. Every sequence is one run from an empty context, so the
calibration sees the text exactly as the model wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.calibration.corpus import Corpus
from intarsia.calibration.turns import Turns, learn_turns
from intarsia.calibration.writing import Sampling, write_sequences
from intarsia.checkpoint.hashing import cache_folder
from intarsia.errors import UserError
from intarsia.progress import Progress, Silent

_FORMAT = 1  # of the cached text; raise it whenever the same settings would write something else


def self_corpus(
    model: torch.nn.Module | Callable[[], torch.nn.Module],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    cache_key: str | None,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """`tokens // seq_len` sequences of `seq_len` tokens that the model wrote.

    Args:
        model: a causal language model of `transformers`, or what gives it; it is only asked for when the text is not
            cached.
        tokenizer: the model's.
        tokens: how many are wanted.
        seq_len: tokens a sequence.
        seed: of the sampling.
        cache_key: identifies the model's weights (their hash); None: nothing is cached.
        sampling: how text is drawn.
        progress: advances by tokens.

    Raises:
        UserError: fewer tokens than one sequence, or the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    if seq_len < 2 or tokens < seq_len:
        raise UserError.of(
            where="calibration text self",
            expected="a sequence length of at least 2, and at least as many tokens as one sequence has",
            found=f"a sequence length of {seq_len} and {tokens} tokens",
            remedy="Ask for more tokens or shorter sequences.",
        )
    turns = learn_turns(tokenizer)
    path = None if cache_key is None else _cache_path(cache_key, tokens, seq_len, seed, sampling, turns)
    written = None if path is None else _read(path, (tokens // seq_len, seq_len))
    if written is None:
        if not isinstance(model, torch.nn.Module):
            model = model()
        written = write_sequences(
            model, tokenizer, turns, tokens // seq_len, seq_len, seed, sampling, progress or Silent()
        )
        if path is not None:
            _keep(path, *written)
    ids_NT, documents = written
    return Corpus.of(ids_NT, description=f"self (seed {seed})", documents=documents)


def _cache_path(key: str, tokens: int, seq_len: int, seed: int, sampling: Sampling, turns: Turns | None) -> Path:
    form = None if turns is None else [turns.opening, turns.to_assistant, turns.to_user, sorted(turns.enders)]
    what = [_FORMAT, key, tokens // seq_len, seq_len, seed, asdict(sampling), form]
    return cache_folder() / "selftext" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:40]}.safetensors"


def _read(path: Path, shape: tuple[int, int]) -> tuple[Tensor, int] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            ids_NT = file.get_tensor("input_ids").to(torch.int64)
            documents = int(file.metadata()["documents"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # not there, or not whole: it is written again
    return (ids_NT, documents) if tuple(ids_NT.shape) == shape else None


def _keep(path: Path, ids_NT: Tensor, documents: int) -> None:
    from safetensors.torch import save

    data = save({"input_ids": ids_NT.to(torch.int32)}, metadata={"documents": str(documents)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staged = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return  # a cache that cannot be written is no reason to lose the text
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(staged, path)
    except BaseException as error:
        Path(staged).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
