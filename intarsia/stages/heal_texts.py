"""The texts of healing: to train on, to measure on, and what the closed form is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import Corpus
from intarsia.data.text import draw
from intarsia.evaluation.perplexity import eval_corpus
from intarsia.options import TextSpec
from intarsia.progress import Progress
from intarsia.recipe.recipe import Recipe
from intarsia.stages.setup import load_tokenizer

_MOST_HELD_OUT = 16384  # tokens: measuring should not take longer than training
_HELD_OUT = 16  # one in so many sequences


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is trained on, what is measured on, and how much of the first the closed form takes."""

    train: Corpus
    held_out: Corpus
    fit: Corpus
    evaluation: tuple[Corpus, ...]

    def facts(self) -> dict[str, Any]:
        """What a continued run must find again."""
        return {
            "train": {"sha256": self.train.sha256, "tokens": self.train.tokens},
            "held_out": {"sha256": self.held_out.sha256, "tokens": self.held_out.tokens},
            "evaluation": {text.description: text.sha256 for text in self.evaluation},
        }


def read_texts(
    recipe: Recipe,
    base: Checkpoint,
    writer: Callable[[], PreTrainedModel],
    *,
    writer_sha256: str,
    data: str | Sequence[str],
    tokens: int,
    seq_len: int,
    fit_tokens: int,
    eval_text: Sequence[str],
    eval_windows: int,
    seed: int,
    progress: Progress,
) -> Texts:
    """Training, held-out and evaluation text.

    Args:
        recipe: what is healed; text that its fits have seen does not judge.
        base: whose tokenizer reads text.
        writer, writer_sha256: gives the model that writes text itself, where that is asked for; and which one it is.

    Raises:
        UserError: one cannot be read or is too short.
    """
    tokenizer = load_tokenizer(base)
    sources = (data,) if isinstance(data, str) else tuple(data)

    def load(tokens: int) -> Corpus:
        text = TextSpec(sources=sources, tokens=tokens, seq_len=seq_len, seed=seed)
        return draw(text, tokenizer, writer=writer, writer_key=writer_sha256).calibration

    corpus = load(tokens=tokens)
    number = max(1, min(round(len(corpus) / _HELD_OUT), _MOST_HELD_OUT // seq_len))
    train, held_out = corpus.split(1.0 - number / len(corpus) if len(corpus) > 1 else 0.5)
    seen = _seen_tokens(recipe, corpus, seed)
    if seen > train.tokens:
        # A longer text begins with the same sequences: what judges is taken from behind those.
        progress.say(f"{seen} tokens of this text were fitted on before: what is held out comes behind them")
        longer = load(tokens=seen + len(held_out) * seq_len)
        held_out = longer.split(1.0 - len(held_out) / len(longer))[1]
    return Texts(
        train=train,
        held_out=replace(held_out, description="held-out text"),
        fit=train.take(max(1, min(len(train), fit_tokens // seq_len))),
        evaluation=tuple(eval_corpus(text, tokenizer, seq_len=seq_len, windows=eval_windows) for text in eval_text),
    )


def _seen_tokens(recipe: Recipe, corpus: Corpus, seed: int) -> int:
    """Tokens of this very text, from the first on, that what a recipe holds was fitted on."""
    told = recipe.provenance.get("calibration") or {}
    same = {"text": corpus.description, "seq_len": corpus.seq_len, "seed": seed}
    fits = bool(recipe.fitted) and all(told.get(name) == value for name, value in same.items())
    return int(told.get("tokens", 0)) if fits else 0
