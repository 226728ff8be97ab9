"""Log-likelihoods of continuations after a context, with shared contexts computed once.

Tokens are those of lm-eval, so that scores are comparable with published ones: trailing white space of the context
belongs to the continuation; both are tokenised together, and split at the length of the context alone. The tokenizer
adds its special tokens, but no second BOS. A context is truncated on the left to the model's positions.

Packed rows of several continuations are used where they are known to work: the families of this project accept a
four-dimensional mask and explicit positions with the attention implementations `sdpa` and `eager`, as long as no row
exceeds a sliding window. All other models get plain rows.
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
_CPU_BATCH = 512  # tokens; more is not faster on one core, and needs more padding
_GPU_BATCH = 16384


@dataclass(frozen=True, kw_only=True)
class Request:
    """Context tokens, and the tokens to score after them; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, max_length: int | None, where: str
) -> tuple[Request, ...]:
    """Tokenise pairs of texts, in order.

    Args:
        pairs: context and continuation; a context is not blank.
        max_length: positions of the model; None for no limit.

    Raises:
        UserError: a continuation has no token of its own, or more tokens than the model's positions.
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
        # Together: white space at the end of the context belongs to the continuation.
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
    """The request with its context truncated to the model's positions; the last token needs none."""
    if max_length is None or len(request.context) + len(request.continuation) <= max_length + 1:
        return request
    kept = max_length + 1 - len(request.continuation)
    return Request(context=request.context[-kept:], continuation=request.continuation)


def positions_of(config: Any) -> int | None:
    """The number of positions of a model, by its config; None if it has none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token rows for a forward pass.

    `ids_BT`; `attend_BTT` True where a token (first T) may attend to another (second T), None for plain causal rows;
    `positions_BT` with `attend_BTT`. Logits are needed only at `row_N`, `column_N`.
    """

    ids_BT: Tensor
    row_N: Tensor
    column_N: Tensor
    attend_BTT: Tensor | None = None
    positions_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """For every request: the summed log-likelihood of its continuation (float64, nats), and whether all of its tokens
    are the likeliest ones."""

    sums_R: Tensor
    greedy_R: Tensor


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """A context with its continuations, by request number."""

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
    """Group requests of similar length into batches, longest first, so that running out of memory shows at once.

    Args:
        requests: in any order; those with one context need not be adjacent.
        pack: share contexts between continuations; else a plain row for each.
        batch_tokens: most rows times columns of a batch (a longer row is a batch of its own).
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
    """Rows of a context followed by all its continuations; plain rows have one each, and need no mask."""
    shape = (len(trees), max(tree.width for tree in trees))
    ids_BT, positions_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    branch_BT = torch.full(shape, -1)  # -1 padding, 0 the context, then the continuations
    # Row and column of every needed logit; and its index, the token scored there, and the token's request.
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
        # Padding is one more branch and attends to itself, because a softmax over nothing would be NaN.
        seen_BTT = (branch_BT[:, None, :] == 0) | (branch_BT[:, None, :] == branch_BT[:, :, None])
        rows = replace(rows, attend_BTT=causal_TT & seen_BTT, positions_BT=positions_BT)
    requests = sum(len(tree.branches) for tree in trees)
    return Batch(rows=rows, position_M=position_M, token_M=token_M, request_M=request_M, requests=requests)


def score_batch(logits_NV: Tensor, batch: Batch) -> Tensor:
    """Log-probability of every scored token `[M]`."""
    position_M, token_M = batch.position_M.to(logits_NV.device), batch.token_M.to(logits_NV.device)
    return logits_NV[position_M, token_M].float() - log_totals(logits_NV)[position_M]


def log_totals(logits_NV: Tensor) -> Tensor:
    """logsumexp of every position in float32, so that low-precision logits are not rounded again.

    Works in place, block by block in one buffer: on the CPU nearly twice as fast as `logsumexp`, with the same result.
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
    """Log-likelihoods of requests on a causal language model of transformers, on its device and in its dtype.

    Args:
        model: its mode (training or not) is restored.
        batch_tokens: tokens per forward pass; None for a default by device.
        pack: see `batches_of`; None for models that support it.
        where: the name of the task, for messages and progress.

    Raises:
        UserError: a needed logit is NaN or infinite.
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
    """The needed logits of rows `[N, V]`; the head of a known family runs only on these positions."""
    inputs = inputs_of(model, rows)

    def wanted(found_BTX: Tensor) -> Tensor:
        return found_BTX[rows.row_N.to(found_BTX.device), rows.column_N.to(found_BTX.device)]

    if not _of_known_family(model):
        return wanted(model(**inputs).logits)
    assert isinstance(model, PreTrainedModel)
    # Changes of the head's output (a scale, a cap) work for any shape.
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (wanted(given[0]),)):
        logits_NV: Tensor = model(**inputs).logits
    return logits_NV


def inputs_of(model: torch.nn.Module, rows: Rows) -> dict[str, Any]:
    """Rows as keyword arguments for a model of transformers, on its device."""
    weight = next(model.parameters())
    inputs: dict[str, Any] = {"input_ids": rows.ids_BT.to(weight.device), "use_cache": False}
    if rows.attend_BTT is not None:
        assert rows.positions_BT is not None
        mask_B1TT = rows.attend_BTT.to(weight.device)[:, None]
        if (
            getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
        ):  # it adds the mask to scores
            none = torch.zeros(mask_B1TT.shape, dtype=weight.dtype, device=weight.device)
            mask_B1TT = none.masked_fill(~mask_B1TT, torch.finfo(weight.dtype).min)
        inputs["attention_mask"] = mask_B1TT
        inputs["position_ids"] = rows.positions_BT.to(weight.device)
    return inputs


def takes_packed_rows(model: torch.nn.Module, longest: int) -> bool:
    """Whether a model accepts packed rows of several continuations, each of at most `longest` tokens."""
    config: Any = getattr(model, "config", None)
    if not _of_known_family(model) or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    window = getattr(config, "sliding_window", None)
    return not window or longest <= window


def default_batch_tokens(device: torch.device) -> int:
    """Tokens per forward pass that keep a device busy."""
    return _CPU_BATCH if device.type == "cpu" else _GPU_BATCH


def _of_known_family(model: torch.nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel):  # the forward of a wrapper, such as PEFT's, may do more
        return False
    return any(model.config.model_type in family.model_types for family in known_families().values())


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within the context, the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
