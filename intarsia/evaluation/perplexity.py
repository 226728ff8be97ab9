"""Perplexity of a text, with its standard error and what is needed to repeat it; and the speed of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.activations.loss import next_token_losses
from intarsia.data.corpus import Corpus, tokenize
from intarsia.data.sources import documents
from intarsia.errors import UserError
from intarsia.evaluation.chain import Chain
from intarsia.progress import current


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a text.

    `value` = exp(`nll`); `nll` is the mean loss in nats over the predicted tokens; `nll_stderr` its standard error,
    from the scatter between windows (0 with one window); `stderr` the same for `value` (to first order); `tokens` are
    the predicted ones; `text` and `text_sha256` say which tokens these were.
    """

    value: float
    nll: float
    nll_stderr: float
    stderr: float
    tokens: int
    windows: int
    seq_len: int
    text: str
    text_sha256: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f} ({self.windows} windows of {self.seq_len}, {self.text})"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of a model, medians over `repeats`.

    `prefill_tokens_per_s`: prompt tokens of the whole batch read in one forward. `decode_tokens_per_s`: new tokens of
    the whole batch, written one after the other with the cache. `time_to_first_token_s`: seconds from the prompt to
    the first new token.
    """

    prefill_tokens_per_s: float
    time_to_first_token_s: float
    decode_tokens_per_s: float
    batch: int
    prompt_len: int
    new_tokens: int
    device: str
    dtype: str
    threads: int
    repeats: int

    def __str__(self) -> str:
        return (
            f"{self.decode_tokens_per_s:.1f} tokens/s decode, {self.prefill_tokens_per_s:.0f} tokens/s prefill "
            f"({self.device}, {self.dtype}, batch {self.batch})"
        )


_MOST_READ = 16 * 1024 * 1024
_BYTES_A_TOKEN = 32


def eval_corpus(
    path: str, tokenizer: Any, *, seq_len: int = 512, windows: int | None = 64, part: str | None = None
) -> Corpus:
    """The first windows of a text, in order.

    Args:
        path: a text source (see `intarsia.data.sources`).
        tokenizer: the model's.
        seq_len: tokens a window.
        windows: how many at most; None for all.
        part: a share of the file, as `0.9:1`.

    Raises:
        UserError: something is wrong with the source, or it is shorter than one window.
    """
    spec = path if part is None else f"{path}{'&' if '#' in path else '#'}{part}"
    limit = None if windows is None else max(_MOST_READ, _BYTES_A_TOKEN * windows * seq_len)
    return tokenize(
        documents(spec, limit_bytes=limit),
        tokenizer,
        tokens=seq_len * (2**40 if windows is None else windows),
        seq_len=seq_len,
        shuffle=False,
        description=spec,
        least=1,
    )


def perplexity(model: torch.nn.Module, corpus: Corpus, *, batch_tokens: int = 4096) -> Perplexity:
    """Measure the perplexity of a causal language model of `transformers` on a corpus.

    Args:
        model: the model, where it is and in its own dtype; left in the mode (training or not) it was in. The layers of
            a streamed one are read once.
        corpus: the windows; padding is not counted.
        batch_tokens: tokens a forward pass.

    Raises:
        UserError: a loss is NaN or infinite, or no token is predicted.
    """
    if isinstance(model, Chain):
        sums_W, counts_W = model.window_losses(corpus, batch_tokens=batch_tokens, progress=current())
    else:
        sums_W, counts_W = window_losses(model, corpus, batch_tokens=batch_tokens)
    tokens = int(counts_W.sum())
    if tokens == 0:
        raise UserError.of(
            where=f"perplexity on {corpus.description}",
            expected="windows with at least two real tokens",
            found="none",
            remedy="Use longer windows or another text.",
        )
    nll = float(sums_W.sum()) / tokens
    nll_stderr = _ratio_stderr(sums_W, counts_W, nll)
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(
        value=value,
        nll=nll,
        nll_stderr=nll_stderr,
        stderr=value * nll_stderr,
        tokens=tokens,
        windows=len(corpus),
        seq_len=corpus.seq_len,
        text=corpus.description,
        text_sha256=corpus.sha256,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def window_losses(model: torch.nn.Module, corpus: Corpus, *, batch_tokens: int = 4096) -> tuple[Tensor, Tensor]:
    """Summed loss (float64, nats) and predicted tokens (int64) of every window, on the CPU.

    Two models measured on the same corpus can be compared window by window with this.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums, counts = [], []
    try:
        with torch.inference_mode(), current().task("perplexity", total=len(corpus)) as task:
            for ids_BT, mask_BT in corpus.batches(max(1, batch_tokens // corpus.seq_len)):
                ids_BT = ids_BT.to(device)
                mask_BT = None if mask_BT is None else mask_BT.to(device)
                sums_B, counts_B = _batch_losses(model, ids_BT, mask_BT, where=f"perplexity on {corpus.description}")
                sums.append(sums_B.cpu())
                counts.append(counts_B.cpu())
                task.advance(len(ids_BT))
    finally:
        model.train(was_training)
    return torch.cat(sums), torch.cat(counts)


def _batch_losses(
    model: torch.nn.Module, ids_BT: Tensor, mask_BT: Tensor | None, *, where: str
) -> tuple[Tensor, Tensor]:
    """With the whole logits: whatever a model does between its last hidden state and its logits is in them."""
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    return next_token_losses(logits_BTV, ids_BT, mask_BT, where=where)


def _ratio_stderr(sums_W: Tensor, counts_W: Tensor, mean: float) -> float:
    """Standard error of sum(sums) / sum(counts), windows being the independent draws."""
    n = len(sums_W)
    if n < 2:
        return 0.0
    residuals_W = sums_W - mean * counts_W
    return float((residuals_W.square().sum() / (n * (n - 1))).sqrt() / counts_W.double().mean())
