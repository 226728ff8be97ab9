"""Text pairs as tokens: a context, and a continuation whose likelihood is asked for.

The cut between the two is lm-eval's, so that scores can be held against published ones: white space at the end of the
context counts to the continuation; context and continuation are tokenised together, and cut where the context
alone would end. A tokenizer adds its special tokens as it does by itself, but no second BOS to a text that begins with
one. What is longer than the model's positions loses tokens at the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """Tokens to look at, and the tokens behind them to be scored; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, max_length: int | None, where: str
) -> tuple[Request, ...]:
    """A request for every pair of texts, in order.

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
            raise UserError.of(
                where=f"{where}, continuation {number} ({continuation[:40]!r})",
                expected=f"at least one token behind the context{limit}",
                found=f"{len(tail)} tokens",
                remedy="Mend the text of this item.",
            )
        requests.append(fit(Request(context=head, continuation=tail), max_length))
    return tuple(requests)


def fit(request: Request, max_length: int | None) -> Request:
    """The request with as much context as the model has positions for; the last token of all needs none."""
    if max_length is None or len(request.context) + len(request.continuation) <= max_length + 1:
        return request
    room = max_length + 1 - len(request.continuation)
    return Request(context=request.context[-room:], continuation=request.continuation)


def positions_of(config: Any) -> int | None:
    """How many positions a model has, by its config; None where that says nothing."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def _opening(tokenizer: Any) -> str:
    """What a text begins with if its BOS is written out."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return "" if token is None else tokenizer.decode(token)


def _encode(tokenizer: Any, text: str, opening: str) -> tuple[int, ...]:
    if opening and text.startswith(opening):
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(tokenizer.encode(text))
