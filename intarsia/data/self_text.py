"""Self-written calibration text: batched sampling with a cache, including conversation turns.

`generate` of transformers takes more than twice as long (dev/LOG.md), with a dynamic or a static cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from intarsia.checkpoint.hashing import cache_folder
from intarsia.data.conversations import Turns, learn_turns
from intarsia.data.corpus import Corpus, check_ids
from intarsia.disk import replaced
from intarsia.errors import UserError
from intarsia.progress import Task, current

Choose: TypeAlias = Callable[[Tensor, int], Tensor | None]
"""Chooses the next token of every row, from the last logits `[B, V]` and its column; None stops."""
_FORMAT = 3  # of the cached text; increase it when the same settings would give other text


class _PreallocatedLayer(DynamicLayer):
    """Keys and values in tensors of their final length; attention sees only the filled part."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new positions, and return all filled ones."""
        if self.filled == 0:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self.all_keys = key_states.new_empty(rows, heads, self.length, width)
            self.all_values = value_states.new_empty(rows, heads, self.length, value_states.shape[-1])
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        assert self.filled <= self.length, "more positions than the cache has"
        self.all_keys[:, :, start : self.filled] = key_states
        self.all_values[:, :, start : self.filled] = value_states
        self.keys = self.all_keys[:, :, : self.filled]
        self.values = self.all_values[:, :, : self.filled]
        return self.keys, self.values


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling parameters."""

    # Temperature of questions and documents: high, for variety.
    temperature: float = 1.0
    # Temperature of answers: lower, because small models lose the thread otherwise.
    answer_temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 100
    # Tokens of a turn, at least and at most.
    shortest_turn: int = 4
    longest_question: int = 96
    longest_answer: int = 384
    # Bytes of keys and values; with `most_rows` it decides the rows of a batch, and so the text.
    cache_bytes: int = 2 * 1024**3
    most_rows: int = 64


class _Row:
    """State of one row: whose turn it is, its length so far, and pending tokens."""

    def __init__(self, turns: Turns | None, after_eos: tuple[int, ...], eos: int | None) -> None:
        self.turns = turns
        self.after_eos = after_eos
        self.eos = eos
        self.user = True
        self.length = 0
        self.forced: list[int] = []
        self.documents = 1

    def next(self, sampled: int, sampling: Sampling) -> int:
        """The next token, given the sampled one."""
        if self.forced:
            return self.forced.pop(0)
        self.length += 1
        if self.turns is None:
            if sampled == self.eos:
                self.length, self.forced = 0, list(self.after_eos)
                self.documents += 1
            return sampled
        longest = sampling.longest_question if self.user else sampling.longest_answer
        if sampled not in self.turns.enders and self.length < longest:
            return sampled
        form = self.turns.to_assistant if self.user else self.turns.to_user
        self.user, self.length, self.forced = not self.user, 0, list(form[1:])
        return form[0]


def write_on(model: Any, ids_BT: Tensor, done: int, choose: Choose, task: Task) -> None:
    """Fill rows of tokens from column `done` on, one column at a time, with a cache."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    cache, length, seen = DynamicCache(config=model.config), ids_BT.shape[1], 0
    # Layers with a sliding window keep the cache of transformers.
    cache.layers = [_PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    # For rows sliced out of a longer tensor, PyTorch would copy the head's matrix for each of them.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    try:
        with torch.inference_mode():
            while done < ids_BT.shape[1]:
                logits_BV = model(
                    input_ids=ids_BT[:, seen:done].to(device),
                    attention_mask=_mask(model, device, seen, done),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                next_B = choose(logits_BV, done)
                if next_B is None:
                    return
                ids_BT[:, done] = next_B
                seen, done = done, done + 1
                task.advance(len(ids_BT))
    finally:
        hook.remove()
        model.train(was_training)


def _write_batch(
    model: Any,
    tokenizer: Any,
    turns: Turns | None,
    size: tuple[int, int],
    seed: int,
    sampling: Sampling,
    task: Task,
) -> tuple[Tensor, int]:
    """Write one batch of rows `[B, T]`; return it with the number of documents in it."""
    n_rows, seq_len = size
    device = next(model.parameters()).device
    chance = torch.Generator().manual_seed(seed % 2**63)
    known = model.get_output_embeddings().weight.shape[0]  # some tokenizers have special tokens without logits
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    eos, bos = (each if each is not None and each < known else None for each in ends)
    enders = sorted(each for each in turns.enders if each < known) if turns else [] if eos is None else [eos]
    marks = sorted(each for each in set(tokenizer.all_special_ids) - set(enders) if each < known)
    banned = torch.tensor(marks, dtype=torch.long, device=device)
    enders_E = torch.tensor(enders, dtype=torch.long, device=device)
    if turns is not None:
        start_BS = torch.tensor([turns.opening[:seq_len]]).expand(n_rows, -1)
    elif (first := eos if bos is None else bos) is not None:
        start_BS = torch.full((n_rows, 1), first)
    else:
        start_BS = torch.randint(min(len(tokenizer), known), (n_rows, 1), generator=chance)
    rows = [_Row(turns, () if bos in (None, eos) else (bos,), eos) for _ in range(n_rows)]
    ids_BT = torch.empty(n_rows, seq_len, dtype=torch.int64)
    done = start_BS.shape[1]
    ids_BT[:, :done] = start_BS
    task.advance(n_rows * done)

    def choose(logits_BV: Tensor, _: int) -> Tensor:
        logits_BV = logits_BV[:, : len(tokenizer)]
        logits_BV.index_fill_(1, banned, -torch.inf)
        early = [b for b, row in enumerate(rows) if row.length < sampling.shortest_turn]
        if early and enders:
            logits_BV[torch.tensor(early, device=device)[:, None], enders_E] = -torch.inf
        answering = [turns is not None and not row.user for row in rows]
        drawn = _draw(logits_BV, torch.tensor(answering, device=device), chance, sampling)
        return torch.tensor([row.next(token, sampling) for row, token in zip(rows, drawn, strict=True)])

    write_on(model, ids_BT, done, choose, task)
    return ids_BT, sum(row.documents for row in rows)


def _mask(model: Any, device: torch.device, seen: int, done: int) -> Tensor | None:
    """None, or a mask that masks nothing, which makes `transformers` choose a faster kernel on the CPU.

    Without a mask, grouped-query attention of a single query uses a kernel that is several times as slow in
    bfloat16 as the one for equal heads.
    """
    heads = model.config.num_attention_heads
    windows = [getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    short = any(window is not None and window <= done for window in windows)
    grouped = getattr(model.config, "num_key_value_heads", heads) != heads
    if device.type != "cpu" or not grouped or done - seen != 1 or short:
        return None
    return torch.ones(1, 1, 1, done, dtype=torch.bool)


def _draw(logits_BV: Tensor, answering_B: Tensor, chance: torch.Generator, sampling: Sampling) -> list[int]:
    """One token per row: top-k, then top-p of the rest, by inversion of the cumulative probabilities."""
    top_BK, ids_BK = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]), dim=-1)  # NaN sorts as the greatest
    if not bool(top_BK[:, 0].isfinite().all()):
        raise UserError(
            "calibration text self: logits of the model: expected finite numbers; found NaN or infinity.",
            "Check the model's weights, and use bfloat16 or float32 if the dtype was float16.",
        )
    heat_B = torch.where(answering_B, sampling.answer_temperature, sampling.temperature)
    p_BK = (top_BK.float() / heat_B[:, None]).softmax(-1)
    before_BK = p_BK.cumsum(-1) - p_BK
    p_BK = p_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    summed_BK = p_BK.cumsum(-1)
    # Drawn on the CPU, so that the draws do not depend on the device.
    at_B1 = torch.rand(len(p_BK), 1, generator=chance).to(p_BK.device) * summed_BK[:, -1:]
    chosen_B1 = torch.searchsorted(summed_BK, at_B1, right=True)
    last_B1 = (p_BK > 0).sum(-1, keepdim=True) - 1
    drawn: list[int] = ids_BK.gather(1, torch.minimum(chosen_B1, last_B1))[:, 0].tolist()
    return drawn


def rows_at_once(model: Any, seq_len: int, sampling: Sampling) -> int:
    """The number of rows in a batch, by the size of their keys and values."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entries = 2 * config.num_hidden_layers * heads * head_dim * seq_len
    row_bytes = int(entries * next(model.parameters()).element_size())
    return max(1, min(sampling.most_rows, sampling.cache_bytes // row_bytes))


def self_corpus(
    model: torch.nn.Module | Callable[[], torch.nn.Module],
    tokenizer: Any,
    *,
    n: int,
    seq_len: int,
    seed: int,
    cache_key: str | None = None,
    sampling: Sampling | None = None,
) -> Corpus:
    """Write sequences with a model.

    Args:
        model: a causal language model of `transformers`, or a function that loads it, called only if the text is not
            cached.
        cache_key: the hash of the model's weights; None disables the cache.

    Raises:
        UserError: the model's logits are not finite, or the chat template holds a token beyond the embedding.
    """
    sampling = sampling or Sampling()
    turns = learn_turns(tokenizer)
    if turns is not None:
        check_ids(max(*turns.opening, *turns.to_assistant, *turns.to_user), tokenizer, "The chat template")
    path = None
    if cache_key is not None:
        form = None if turns is None else [turns.opening, turns.to_assistant, turns.to_user, sorted(turns.enders)]
        what = [_FORMAT, cache_key, [n, seq_len, seed], asdict(sampling), form]
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:40]
        path = cache_folder() / "selftext" / f"{name}.safetensors"
    written = None if path is None else _read(path, (n, seq_len))
    if written is None:
        if not isinstance(model, torch.nn.Module):
            model = model()
        rows = min(n, rows_at_once(model, seq_len, sampling))
        parts, documents = [], 0
        with current().task("writing text", total=n * seq_len) as task:
            for start in range(0, n, rows):
                size, chance = (min(rows, n - start), seq_len), seed * 1_000_003 + start
                ids_BT, count = _write_batch(model, tokenizer, turns, size, chance, sampling, task)
                parts.append(ids_BT)
                documents += count
        written = torch.cat(parts), documents
        if path is not None:
            _keep(path, *written)
    ids_NT, documents = written
    return Corpus.of(ids_NT, description=f"self (seed {seed})", documents=documents)


def _read(path: Path, shape: tuple[int, int]) -> tuple[Tensor, int] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            ids_NT = file.get_tensor("input_ids").to(torch.int64)
            documents = int(file.metadata()["documents"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # missing or damaged: write it again
    return (ids_NT, documents) if tuple(ids_NT.shape) == shape else None


def _keep(path: Path, ids_NT: Tensor, documents: int) -> None:
    from safetensors.torch import save

    data = save({"input_ids": ids_NT.to(torch.int32)}, metadata={"documents": str(documents)})
    with suppress(OSError, UserError):  # the text is good even if the cache cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_bytes(data)
