"""Log-likelihoods of continuations after a context, with shared contexts computed once.

Tokens are lm-eval's, so that scores can be compared with published ones: trailing white space of the context belongs to
the continuation; both are tokenised together, and split where the context alone would stop. The tokenizer adds its
special tokens, but no second BOS to a text that has one. A context is truncated at the left to the model's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import UserError
from intarsia.progress import current


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
        tokenizer: of transformers.
        max_length: positions of the model; None where it has no limit.
        where: what the pairs are, for messages.

    Raises:
        UserError: a continuation has no token of its own, or more than the model has positions for.
    """
    known: dict[str, tuple[int, ...]] = {}
    opening = _opening(tokenizer)
    requests = []
    for number, (context, continuation) in enumerate(pairs, start=1):
        kept = context.rstrip()
        assert kept, "a context is not blank"
        if kept not in known:
            known = {kept: _encode(tokenizer, kept, opening)}  # the choices of a question follow each other
        head = known[kept]
        # In one piece: white space at the end of the context counts to the continuation.
        tail = _encode(tokenizer, context + continuation, opening)[len(head) :]
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


def _opening(tokenizer: Any) -> str:
    """The BOS (or EOS) token as text."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return "" if token is None else tokenizer.decode(token)


def _encode(tokenizer: Any, text: str, opening: str) -> tuple[int, ...]:
    if opening and text.startswith(opening):
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(tokenizer.encode(text))


_CPU_BLOCK = 8 * 49152  # float32 entries of one block of logits: inside a core's cache
_GPU_BLOCK = 64 * 1024 * 1024


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


Forward = Callable[[Rows], Tensor]
"""From rows (on the CPU) to their wanted logits `[N, V]`, on any device."""


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """Of every request: the summed log-likelihood of its continuation (float64, nats), and whether each of its tokens
    is the likeliest one (None if that was not asked for)."""

    sums_R: Tensor
    greedy_R: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """A context, and its continuations by the number of their request."""

    context: tuple[int, ...]
    branches: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def width(self) -> int:
        """Tokens of the row."""
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.branches)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows, and for every scored token: the index of its logits, its id, and its request."""

    rows: Rows
    position_M: Tensor
    token_M: Tensor
    request_M: Tensor
    requests: int


def log_likelihoods(
    forward: Forward,
    requests: Sequence[Request],
    *,
    pack: bool,
    batch_tokens: int,
    greedy: bool = False,
    where: str = "log-likelihoods",
) -> Likelihoods:
    """Score every request.

    Args:
        forward: the model.
        requests: in any order; those with one context need not stand together.
        pack: share contexts between continuations; else a plain row for each.
        batch_tokens: rows times columns of a batch, at most (a longer row goes alone).
        greedy: whether to find which continuations greedy decoding would give.
        where: the name of what is scored, for messages and progress.

    Raises:
        UserError: a logit that matters is NaN or infinite.
    """
    sums_R = torch.zeros(len(requests), dtype=torch.float64)
    misses_R = torch.zeros(len(requests), dtype=torch.int64)
    with torch.inference_mode(), current().task(where, total=len(requests)) as task:
        for batch in batches_of(requests, pack=pack, batch_tokens=batch_tokens):
            log_p_M, missed_M = score_batch(forward(batch.rows), batch, greedy=greedy)
            if not bool(log_p_M.isfinite().all()):
                raise UserError(
                    f"{where}: a log-likelihood is NaN or infinite.",
                    "Check the model's weights, and use bfloat16 or float32 if it was run in float16.",
                )
            sums_R.index_add_(0, batch.request_M, log_p_M.cpu().double())
            if missed_M is not None:
                misses_R.index_add_(0, batch.request_M, missed_M.cpu().long())
            task.advance(batch.requests)
    return Likelihoods(sums_R=sums_R, greedy_R=misses_R == 0 if greedy else None)


def batches_of(requests: Sequence[Request], *, pack: bool, batch_tokens: int) -> Iterator[Batch]:
    """Group requests into the batches of `log_likelihoods`, for callers that run the same ones many times."""
    for trees in _batches(_trees(requests, pack), batch_tokens):
        yield _packed(trees) if pack else _plain(trees)


def _trees(requests: Sequence[Request], pack: bool) -> list[_Tree]:
    if not pack:
        return [
            _Tree(context=request.context, branches=((number, request.continuation),))
            for number, request in enumerate(requests)
        ]
    shared: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for number, request in enumerate(requests):
        shared.setdefault(request.context, []).append((number, request.continuation))
    return [_Tree(context=context, branches=tuple(branches)) for context, branches in shared.items()]


def _batches(trees: Sequence[_Tree], batch_tokens: int) -> Iterator[list[_Tree]]:
    """Group trees of similar length, the longest first, so that a lack of memory shows at once."""
    batch: list[_Tree] = []
    for tree in sorted(trees, key=lambda tree: -tree.width):
        if batch and batch[0].width * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def _packed(trees: Sequence[_Tree]) -> Batch:
    """Rows of a context with all its continuations after it."""
    shape = (len(trees), max(tree.width for tree in trees))
    ids_BT, positions_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    branch_BT = torch.full(shape, -1)  # -1 padding, 0 the context, then the continuations
    picks = _Picks()
    for row, tree in enumerate(trees):
        known = column = len(tree.context)
        ids_BT[row, :known] = torch.tensor(tree.context)
        positions_BT[row, :known] = torch.arange(known)
        branch_BT[row, :known] = 0
        last = picks.position(row, known - 1)  # every continuation starts after the context's last token
        for branch, (request, tokens) in enumerate(tree.branches, start=1):
            end = column + len(tokens) - 1
            ids_BT[row, column:end] = torch.tensor(tokens[:-1], dtype=torch.int64)
            positions_BT[row, column:end] = torch.arange(known, known + len(tokens) - 1)
            branch_BT[row, column:end] = branch
            picks.score(request, tokens, [last, *(picks.position(row, at) for at in range(column, end))])
            column = end
    causal_TT = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    seen_BTT = (branch_BT[:, None, :] == 0) | (branch_BT[:, None, :] == branch_BT[:, :, None])
    # Padding is one more branch and sees itself too: a softmax over nothing would be NaN.
    return picks.batch(ids_BT, attend_BTT=causal_TT & seen_BTT, positions_BT=positions_BT)


def _plain(trees: Sequence[_Tree]) -> Batch:
    """A row for every continuation."""
    rows = [(*tree.context, *tokens[:-1]) for tree in trees for _, tokens in tree.branches]
    width = max(map(len, rows))
    picks = _Picks()
    for row, tree in enumerate(trees):
        ((request, tokens),) = tree.branches
        start = len(tree.context) - 1
        picks.score(request, tokens, [picks.position(row, start + step) for step in range(len(tokens))])
    return picks.batch(torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]))


class _Picks:
    """Collects the positions of a batch whose logits are needed, and the tokens scored there."""

    def __init__(self) -> None:
        self._positions: list[tuple[int, int]] = []
        self._scored: list[tuple[int, int, int]] = []
        self._requests = 0

    def position(self, row: int, column: int) -> int:
        self._positions.append((row, column))
        return len(self._positions) - 1

    def score(self, request: int, tokens: Sequence[int], positions: Sequence[int]) -> None:
        self._scored.extend((at, token, request) for at, token in zip(positions, tokens, strict=True))
        self._requests += 1

    def batch(self, ids_BT: Tensor, *, attend_BTT: Tensor | None = None, positions_BT: Tensor | None = None) -> Batch:
        row_N, column_N = torch.tensor(self._positions).unbind(1)
        position_M, token_M, request_M = torch.tensor(self._scored).unbind(1)
        return Batch(
            rows=Rows(ids_BT=ids_BT, row_N=row_N, column_N=column_N, attend_BTT=attend_BTT, positions_BT=positions_BT),
            position_M=position_M,
            token_M=token_M,
            request_M=request_M,
            requests=self._requests,
        )


def score_batch(logits_NV: Tensor, batch: Batch, *, greedy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every scored token, and whether another one is likelier."""
    device = logits_NV.device
    position_M, token_M = batch.position_M.to(device), batch.token_M.to(device)
    total_N = log_totals(logits_NV)
    missed_M = logits_NV.argmax(-1)[position_M] != token_M if greedy else None
    return logits_NV[position_M, token_M].float() - total_N[position_M], missed_M


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
