"""How good a recipe's model is while it is healed: perplexities, and how far its hidden states are from the original's.

Nothing is built for that: the recipe's layers run between the original's embedding and head.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
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
from intarsia.recipe.recipe import Recipe, identity

_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 16384


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Perplexities and hidden-state errors of a model."""

    texts: tuple[Perplexity, ...]
    # For every output layer, the mean over tokens of |h - H^stop|^2 / |H^stop|^2 with the original's hidden state
    # H^stop, on the first text; the layer reads what the layers before it gave.
    errors: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the run folder."""
        names = ("text", "value", "nll", "stderr")
        texts = [{name: getattr(text, name) for name in names} for text in self.texts]
        return {"texts": texts, "errors": list(self.errors)}


def quality(
    recipe: Recipe,
    resident: LoadedModel,
    texts: Sequence[Corpus],
    *,
    errors: bool = True,
    memory_budget: MemoryBudget | None = None,
) -> Quality:
    """Measure a recipe's model.

    Args:
        resident: the recipe's base.
        errors: measure the layers' hidden states on the first text too.
        memory_budget: what hidden states may take in memory.
    """
    memory_budget = memory_budget or MemoryBudget()
    model = Chain(recipe, resident, memory_budget=memory_budget)
    batch_tokens = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
    found = tuple(perplexity(model, text, batch_tokens=batch_tokens) for text in texts)
    batches = Batches(texts[0], resident.device, batch_tokens=batch_tokens)
    return Quality(texts=found, errors=tuple(_errors(recipe, model, batches, memory_budget)) if errors else ())


@torch.inference_mode()
def _errors(recipe: Recipe, model: Chain, batches: Batches, memory_budget: MemoryBudget) -> list[float]:
    """Both models go through their layers once: the recipe's first, whose states are kept after each span."""
    loop = Loop(model.layers.resident, batches, memory_budget=memory_budget)
    own, original = loop.store(), loop.store()
    whole = RecipeLayers.of(identity(recipe.variant(recipe.base), recipe.depth), loop.resident)
    sums = [0.0] * len(recipe.layers)
    try:
        loop.embed(own)
        for index in loop.through(model.layers.placed(), own, at=range(len(recipe.layers) + 1)):
            if index == 0:
                own.drop(0)
        loop.embed(original)
        for depth in chain((0,), (layer + 1 for layer in loop.through(whole.placed(), original))):
            for index in (index for index, (_, stop) in enumerate(recipe.spans) if stop == depth):
                for rows, ids, mask in batches.over():
                    real = ids.numel() if mask is None else int(mask.sum())
                    wanted, found = loop.reader(original)(rows), loop.reader(own, index + 1)(rows)
                    sums[index] += float(hidden_mse(wanted, found, mask)) * real
                own.drop(index + 1)
    finally:
        own.close()
        original.close()
    return [total / max(batches.corpus.tokens, 1) for total in sums]
