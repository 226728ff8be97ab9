"""Evaluate: how good a model is."""

from __future__ import annotations

from intarsia.building.loaded_model import load_model
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.evaluation.chain import Chain
from intarsia.evaluation.perplexity import Perplexity, eval_corpus, perplexity
from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Variant, identity
from intarsia.stages.placement import placement
from intarsia.stages.setup import check_seq_len, load_tokenizer


def evaluate_perplexity(
    model: str,
    text: str,
    *,
    seq_len: int = 512,
    windows: int | None = 64,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    stream: bool = False,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a model on a text, over windows that do not overlap.

    Args:
        model: a local folder, a hub id, or `demo`.
        text: a text source; `file.txt#0.9:1` is the last tenth of a file.
        windows: how many of its first windows; None for all.
        stream: keep one layer in memory at a time, and each is read once.
        memory_bytes: what the windows' hidden states may then take in memory; the rest goes to temporary files.

    Raises:
        UserError: the model or the text cannot be used.
    """
    progress = progress or Silent()
    where = placement(device=device, dtype=dtype, stream=stream, memory_bytes=memory_bytes)
    checkpoint = open_checkpoint(model, revision=revision, progress=progress)
    check_seq_len(checkpoint, seq_len)
    corpus = eval_corpus(text, load_tokenizer(checkpoint), seq_len=seq_len, windows=windows)
    scan(checkpoint, progress)
    if not stream:
        return perplexity(load_model(checkpoint, device=where.device, dtype=where.dtype), corpus, progress=progress)
    whole = identity(Variant(name="base", model=model), checkpoint.architecture.n_layers)
    return perplexity(Chain(whole, where.resident(checkpoint), room=where.room()), corpus, progress=progress)
