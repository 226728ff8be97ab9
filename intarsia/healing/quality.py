"""How good a recipe's model is while it is healed: perplexities, and how far its hidden states are from the original's.

Nothing is built for that: the recipe's layers run between the original's embedding and head.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from intarsia.activations.hidden_store import HiddenStore, Room
from intarsia.activations.loop import Batches
from intarsia.building.loaded_model import Resident
from intarsia.data.corpus import Corpus
from intarsia.evaluation.chain import Chain
from intarsia.evaluation.perplexity import Perplexity, perplexity
from intarsia.healing.losses import hidden_mse
from intarsia.progress import Progress
from intarsia.recipe.recipe import Recipe, identity

_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 16384


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Perplexities and hidden-state errors of a model."""

    # Of the held-out sequences first, then of the evaluation texts.
    texts: tuple[Perplexity, ...]
    # For every output layer, the mean over tokens of |h - H^stop|^2 / |H^stop|^2 with the original's hidden state
    # H^stop, on held-out sequences; the layer reads what the layers before it gave.
    errors: tuple[float, ...]

    @property
    def held_out(self) -> Perplexity:
        """Perplexity of the held-out sequences."""
        return self.texts[0]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the run folder."""
        texts = [
            {"text": text.text, "value": text.value, "nll": text.nll, "stderr": text.stderr} for text in self.texts
        ]
        return {"texts": texts, "errors": list(self.errors)}


def quality(
    recipe: Recipe,
    resident: Resident,
    held_out: Corpus,
    texts: Sequence[Corpus] = (),
    *,
    errors: bool = True,
    room: Room | None = None,
    progress: Progress,
) -> Quality:
    """Measure a recipe's model.

    Args:
        resident: the recipe's base.
        held_out: sequences that nothing is trained on.
        texts: further texts for perplexities.
        errors: measure the layers' hidden states too.
        room: what hidden states may take in memory.

    Raises:
        UserError: a loss is not finite.
    """
    room = room or Room()
    chain = Chain(recipe, resident, room=room)
    batch_tokens = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
    found = [perplexity(chain, text, batch_tokens=batch_tokens, progress=progress) for text in (held_out, *texts)]
    if not errors:
        return Quality(texts=tuple(found), errors=())
    batches = Batches(held_out, resident.device, batch_tokens=batch_tokens, progress=progress)
    return Quality(texts=tuple(found), errors=tuple(_errors(recipe, chain, resident, batches, room)))


@torch.inference_mode()
def _errors(recipe: Recipe, chain: Chain, resident: Resident, batches: Batches, room: Room) -> list[float]:
    """Both models go through their layers once: the recipe's first, whose states are kept at the ends of its spans."""
    corpus = batches.corpus
    shape, dtype = (len(corpus), corpus.seq_len, resident.architecture.width), resident.model.dtype
    own, original = HiddenStore(shape, dtype, room=room), HiddenStore(shape, dtype, room=room)
    ends = HiddenStore(shape, dtype, room=room)
    sums = [0.0] * len(recipe.layers)

    def keep(index: int) -> None:
        for rows, _, _ in batches.over():
            ends.put(index, rows.start, own.get(0, rows.start, rows.stop, torch.device("cpu")))

    def compare(depth: int) -> None:
        for index, (_, stop) in enumerate(recipe.spans):
            if stop != depth:
                continue
            for rows, ids, mask in batches.over():
                h_BTD, found = (
                    store.get(at, rows.start, rows.stop, resident.device)
                    for store, at in ((original, 0), (ends, index))
                )
                real = ids.numel() if mask is None else int(mask.sum())
                sums[index] += float(hidden_mse(h_BTD, found, mask)) * real
            ends.drop(index)

    try:
        chain.through(batches, own, keep)
        _original(recipe, resident, batches, original, compare)
    finally:
        for store in (own, original, ends):
            store.close()
    return [total / max(corpus.tokens, 1) for total in sums]


def _original(
    recipe: Recipe, resident: Resident, batches: Batches, states: HiddenStore, compare: Callable[[int], None]
) -> None:
    """The original goes through its layers; `compare` is called at every depth."""
    variant = recipe.variant(recipe.base)
    whole = Chain(identity(variant, recipe.depth), resident)
    batches.each(lambda rows, ids, mask: states.put(0, rows.start, whole.stream.enter(ids, mask).h_BTD))
    compare(0)
    whole.through(batches, states, lambda layer: compare(layer + 1))
