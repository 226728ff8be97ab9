"""Log-likelihoods of continuations after a context, with shared contexts computed once.

Tokens are lm-eval's, so that scores can be compared with published ones: trailing white space of the context belongs to
the continuation; both are tokenised together, and split where the context alone would stop. The tokenizer adds its
special tokens, but no second BOS to a text that has one. A context is truncated at the left to the model's positions.

Whether a model takes rows of several continuations is known, not tried: the families of this project take a mask of
four dimensions and positions as they are given, with the attention implementations `sdpa` and `eager`, as long as no
row reaches past a sliding window. Everything else gets plain rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.activations.statistics import require_finite
from intarsia.architecture.families import known_families
from intarsia.errors import UserError
from intarsia.progress import current

_CPU_BLOCK = 8 * 49152  # float32 entries of one block of logits: inside a core's cache
_GPU_BLOCK = 64 * 1024 * 1024
_CPU_BATCH = 512  # tokens; more is no faster for one core, and padded more
_GPU_BATCH = 16384


@dataclass(frozen=True, kw_only=True)
class Request:
    """Context tokens, and the tokens after them to be scored; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, max_length: int | None, where: str
) -> tuple[Request, ...]:
    """Tokenise pairs of texts, in order.

    Args:
        pairs: context and continuation; a context has more than white space.
        max_length: positions of the model; None where it has no limit.

    Raises:
        UserError: a continuation has no token of its own, or more than the model has positions for.
    """
    known: dict[str, tuple[int, ...]] = {}
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    opening = "" if first is None else tokenizer.decode(first)
    requests = []

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=not (opening and text.startswith(opening))))

    for number, (context, continuation) in enumerate(pairs, start=1):
        kept = context.rstrip()
        assert kept, "a context is not blank"
        if kept not in known:
            known = {kept: encode(kept)}  # the choices of a question follow each other
        head = known[kept]
        # In one piece: white space at the end of the context counts to the continuation.
        tail = encode(context + continuation)[len(head) :]
        if not tail or (max_length is not None and len(tail) > max_length):
            limit = "" if max_length is None else f", and at most {max_length} (the model's positions)"
            raise UserError(
                f"{where}, continuation {number} ({continuation[:40]!r}) has {len(tail)} tokens after the context; "
                f"it needs at least one{limit}.",
                "Correct the text of this item.",
            )
        requests.append(fit(Request(context=head, continuation=tail), max_length))
    return tuple(requests)


def fit(request: Request, max_length: int | None) -> Request:
    """The request with its context truncated to the model's positions; the last token of all needs none."""
    if max_length is None or len(request.context) + len(request.continuation) <= max_length + 1:
        return request
    kept = max_length + 1 - len(request.continuation)
    return Request(context=request.context[-kept:], continuation=request.continuation)


def positions_of(config: Any) -> int | None:
    """The positions of a model, by its config; None where that says nothing."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token rows for a forward pass.

    `ids_BT`; `attend_BTT` True where a token (first T) may look at another (second T), None for plain causal rows;
    `positions_BT` with `attend_BTT`. Logits are wanted only at `row_N`, `column_N`.
    """

    ids_BT: Tensor
    row_N: Tensor
    column_N: Tensor
    attend_BTT: Tensor | None = None
    positions_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """Of every request: the summed log-likelihood of its continuation (float64, nats), and whether each of its tokens
    is the likeliest one."""

    sums_R: Tensor
    greedy_R: Tensor


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """A context, and its continuations by the number of their request."""

    context: tuple[int, ...]
    branches: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def width(self) -> int:
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.branches)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows, and for every scored token: the index of its logits, its id, and its request."""

    rows: Rows
    position_M: Tensor
    token_M: Tensor
    request_M: Tensor
    requests: int


def batches_of(requests: Sequence[Request], *, pack: bool, batch_tokens: int) -> Iterator[Batch]:
    """Group requests of similar length into batches, the longest first, so that a lack of memory shows at once.

    Args:
        requests: in any order; those with one context need not stand together.
        pack: share contexts between continuations; else a plain row for each.
        batch_tokens: rows times columns of a batch, at most (a longer row goes alone).
    """
    shared: dict[Any, list[tuple[int, tuple[int, ...]]]] = {}
    for number, request in enumerate(requests):
        shared.setdefault(request.context if pack else number, []).append((number, request.continuation))
    trees = [_Tree(context=requests[found[0][0]].context, branches=tuple(found)) for found in shared.values()]
    batch: list[_Tree] = []
    for tree in sorted(trees, key=lambda tree: -tree.width):
        if batch and batch[0].width * (len(batch) + 1) > batch_tokens:
            yield _batch(batch, pack=pack)
            batch = []
        batch.append(tree)
    if batch:
        yield _batch(batch, pack=pack)


def _batch(trees: Sequence[_Tree], *, pack: bool) -> Batch:
    """Rows of a context with all its continuations after it; plain rows have one each, and need no mask."""
    shape = (len(trees), max(tree.width for tree in trees))
    ids_BT, positions_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    branch_BT = torch.full(shape, -1)  # -1 padding, 0 the context, then the continuations
    # Row and column of every logit that is needed; and its number, the token scored there and the token's request.
    wanted, scored = list[tuple[int, int]](), list[tuple[int, int, int]]()
    for row, tree in enumerate(trees):
        known = column = len(tree.context)
        ids_BT[row, :known] = torch.tensor(tree.context)
        positions_BT[row, :known] = torch.arange(known)
        branch_BT[row, :known] = 0
        last = len(wanted)  # every continuation starts after the context's last token
        wanted.append((row, known - 1))
        for branch, (request, tokens) in enumerate(tree.branches, start=1):
            end = column + len(tokens) - 1
            ids_BT[row, column:end] = torch.tensor(tokens[:-1], dtype=torch.int64)
            positions_BT[row, column:end] = torch.arange(known, known + len(tokens) - 1)
            branch_BT[row, column:end] = branch
            numbers = [last, *range(len(wanted), len(wanted) + end - column)]
            scored += [(number, token, request) for number, token in zip(numbers, tokens, strict=True)]
            wanted += [(row, at) for at in range(column, end)]
            column = end
    (row_N, column_N), (position_M, token_M, request_M) = (torch.tensor(each).unbind(1) for each in (wanted, scored))
    rows = Rows(ids_BT=ids_BT, row_N=row_N, column_N=column_N)
    if pack:
        causal_TT = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
        # Padding is one more branch and sees itself too: a softmax over nothing would be NaN.
        seen_BTT = (branch_BT[:, None, :] == 0) | (branch_BT[:, None, :] == branch_BT[:, :, None])
        rows = replace(rows, attend_BTT=causal_TT & seen_BTT, positions_BT=positions_BT)
    requests = sum(len(tree.branches) for tree in trees)
    return Batch(rows=rows, position_M=position_M, token_M=token_M, request_M=request_M, requests=requests)


def score_batch(logits_NV: Tensor, batch: Batch) -> Tensor:
    """Log-probability of every scored token `[M]`."""
    position_M, token_M = batch.position_M.to(logits_NV.device), batch.token_M.to(logits_NV.device)
    return logits_NV[position_M, token_M].float() - log_totals(logits_NV)[position_M]


def log_totals(logits_NV: Tensor) -> Tensor:
    """logsumexp of every position, in float32: logits of a low precision are not rounded once more.

    Block by block in one buffer, in place: on the CPU nearly twice as fast as `logsumexp`, with the same result.
    """
    budget = _CPU_BLOCK if logits_NV.device.type == "cpu" else _GPU_BLOCK
    step = max(1, budget // logits_NV.shape[-1])
    buffer_NV = torch.empty((min(step, len(logits_NV)), logits_NV.shape[-1]), device=logits_NV.device)
    found = []
    for block_NV in logits_NV.split(step):
        part_NV = buffer_NV[: len(block_NV)].copy_(block_NV)
        most_N1 = part_NV.amax(-1, keepdim=True)
        found.append(part_NV.sub_(most_N1).exp_().sum(-1).log_() + most_N1[:, 0])
    return torch.cat(found)


def score_requests(
    model: torch.nn.Module,
    requests: Sequence[Request],
    *,
    batch_tokens: int | None = None,
    pack: bool | None = None,
    where: str = "log-likelihoods",
) -> Likelihoods:
    """Log-likelihoods of requests on a causal language model of transformers, where it is and in its own dtype.

    Args:
        model: left in the mode (training or not) it was in.
        batch_tokens: tokens a forward pass; None for a default by device.
        pack: see `batches_of`; None where the model takes it.
        where: the name of what is scored, for messages and progress.

    Raises:
        UserError: a logit that matters is NaN or infinite.
    """
    if pack is None:
        longest = max((len(request.context) + len(request.continuation) for request in requests), default=0)
        pack = takes_packed_rows(model, longest)
    batch_tokens = batch_tokens or default_batch_tokens(next(model.parameters()).device)
    sums_R = torch.zeros(len(requests), dtype=torch.float64)
    misses_R = torch.zeros(len(requests), dtype=torch.int64)
    with evaluating(model), torch.inference_mode(), current().task(where, total=len(requests)) as task:
        for batch in batches_of(requests, pack=pack, batch_tokens=batch_tokens):
            logits_NV = logits_of(model, batch.rows)
            log_p_M = score_batch(logits_NV, batch)
            require_finite(log_p_M, f"A log-likelihood of {where}")
            missed_M = logits_NV.argmax(-1).cpu()[batch.position_M] != batch.token_M
            sums_R.index_add_(0, batch.request_M, log_p_M.cpu().double())
            misses_R.index_add_(0, batch.request_M, missed_M.long())
            task.advance(batch.requests)
    return Likelihoods(sums_R=sums_R, greedy_R=misses_R == 0)


def logits_of(model: torch.nn.Module, rows: Rows) -> Tensor:
    """The wanted logits of rows `[N, V]`; the head of a known family is given these positions alone."""
    inputs = inputs_of(model, rows)

    def wanted(found_BTX: Tensor) -> Tensor:
        return found_BTX[rows.row_N.to(found_BTX.device), rows.column_N.to(found_BTX.device)]

    if not _of_known_family(model):
        return wanted(model(**inputs).logits)
    assert isinstance(model, PreTrainedModel)
    # What the model does to the head's output (to scale it, to cap it) holds for any shape.
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (wanted(given[0]),)):
        logits_NV: Tensor = model(**inputs).logits
    return logits_NV


def inputs_of(model: torch.nn.Module, rows: Rows) -> dict[str, Any]:
    """Rows as the keyword arguments of a model of transformers, on its device."""
    weight = next(model.parameters())
    inputs: dict[str, Any] = {"input_ids": rows.ids_BT.to(weight.device), "use_cache": False}
    if rows.attend_BTT is not None:
        assert rows.positions_BT is not None
        mask_B1TT = rows.attend_BTT.to(weight.device)[:, None]
        if getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager":  # adds it to scores
            none = torch.zeros(mask_B1TT.shape, dtype=weight.dtype, device=weight.device)
            mask_B1TT = none.masked_fill(~mask_B1TT, torch.finfo(weight.dtype).min)
        inputs["attention_mask"] = mask_B1TT
        inputs["position_ids"] = rows.positions_BT.to(weight.device)
    return inputs


def takes_packed_rows(model: torch.nn.Module, longest: int) -> bool:
    """Whether a model can be given rows of several continuations, none longer by itself than `longest` tokens."""
    config: Any = getattr(model, "config", None)
    if not _of_known_family(model) or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    window = getattr(config, "sliding_window", None)
    return not window or longest <= window


def default_batch_tokens(device: torch.device) -> int:
    """Tokens a forward pass that keep a device busy."""
    return _CPU_BATCH if device.type == "cpu" else _GPU_BATCH


def _of_known_family(model: torch.nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel):  # wrapped, by PEFT for example: its forward may do more
        return False
    return any(model.config.model_type in family.model_types for family in known_families().values())


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
