"""How good a recipe's model is while it is healed: perplexities, and how far its hidden states are from the original's.

Nothing is built for that: the recipe's layers run between the original's embedding and head.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.recipe_layers import RecipeLayers
from intarsia.data.corpus import Corpus
from intarsia.evaluation.perplexity import Chain, perplexity
from intarsia.evaluation.results import Perplexity
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
    resident: LoadedModel,
    held_out: Corpus,
    texts: Sequence[Corpus] = (),
    *,
    errors: bool = True,
    memory_budget: MemoryBudget | None = None,
    progress: Progress,
) -> Quality:
    """Measure a recipe's model.

    Args:
        resident: the recipe's base.
        held_out: sequences that nothing is trained on.
        texts: further texts for perplexities.
        errors: measure the layers' hidden states too.
        memory_budget: what hidden states may take in memory.

    Raises:
        UserError: a loss is not finite.
    """
    memory_budget = memory_budget or MemoryBudget()
    chain = Chain(recipe, resident, memory_budget=memory_budget)
    batch_tokens = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
    found = [perplexity(chain, text, batch_tokens=batch_tokens) for text in (held_out, *texts)]
    if not errors:
        return Quality(texts=tuple(found), errors=())
    batches = Batches(held_out, resident.device, batch_tokens=batch_tokens, progress=progress)
    return Quality(texts=tuple(found), errors=tuple(_errors(recipe, chain, batches, memory_budget)))


@torch.inference_mode()
def _errors(recipe: Recipe, chain: Chain, batches: Batches, memory_budget: MemoryBudget) -> list[float]:
    """Both models go through their layers once: the recipe's first, whose states are kept after each span."""
    loop = Loop(chain.layers.resident, batches, memory_budget=memory_budget)
    own, original = loop.store(), loop.store()
    whole = RecipeLayers.of(identity(recipe.variant(recipe.base), recipe.depth), loop.resident)
    sums = [0.0] * len(recipe.layers)

    def compare(depth: int) -> None:
        for index, (_, stop) in enumerate(recipe.spans):
            if stop != depth:
                continue
            for rows, ids, mask in batches.over():
                real = ids.numel() if mask is None else int(mask.sum())
                wanted, found = loop.reader(original)(rows), loop.reader(own, index + 1)(rows)
                sums[index] += float(hidden_mse(wanted, found, mask)) * real
            own.drop(index + 1)

    try:
        loop.embed(own)
        for index in loop.through(chain.layers.placed(), own, at=range(len(recipe.layers) + 1)):
            if index == 0:
                own.drop(0)
        loop.embed(original)
        compare(0)
        for layer in loop.through(whole.placed(), original):
            compare(layer + 1)
    finally:
        own.close()
        original.close()
    return [total / max(batches.corpus.tokens, 1) for total in sums]
