"""A score with what is needed to judge and to repeat it."""

from __future__ import annotations

from dataclasses import dataclass


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
