"""How good a recipe's model is while it is healed: perplexities, and how far its hidden states are from the original's.

Nothing is built for that: the recipe's layers run between the original's embedding and head.

Shape suffixes: `B` sequences, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.stream import LayerStream
from intarsia.evaluation.perplexity import perplexity
from intarsia.evaluation.result import Perplexity
from intarsia.healing.losses import hidden_mse
from intarsia.progress import Progress
from intarsia.recipe.recipe import Recipe

_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 16384


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What is told of a model.

    `texts`: perplexities, the held-out sequences' first, then those of the evaluation texts. `errors`: for every output
    layer, the mean over tokens of |h - H^stop|^2 / |H^stop|^2 with the original's hidden state H^stop, on held-out
    sequences; the layer reads what the layers before it gave.
    """

    texts: tuple[Perplexity, ...]
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


class Chain(nn.Module):
    """A recipe's layers between the original's embedding and head, callable like a causal language model."""

    def __init__(self, recipe: Recipe, resident: Resident) -> None:
        super().__init__()
        self.stream = LayerStream(resident.model, resident.anatomy)
        self.sources = [op.sources[0].layer for op in recipe.layers]
        self.chain = nn.ModuleList(
            resident.module(op, recipe.fitted.get(index)) for index, op in enumerate(recipe.layers)
        )
        self.eval()

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor | None) -> list[Tensor]:
        """The residual stream behind every layer."""
        entry = self.stream.enter(ids_BT, mask_BT)
        h_BTD, found = entry.h_BTD, []
        for layer, source in zip(self.chain, self.sources, strict=True):
            h_BTD = self.stream.run(layer, h_BTD, entry.calls[source])
            found.append(h_BTD)
        return found

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        """Logits, as transformers gives them."""
        h_BTD = self.hidden(input_ids, attention_mask)[-1]
        return SimpleNamespace(logits=self.stream.logits(h_BTD, input_ids, attention_mask))


def quality(
    recipe: Recipe,
    resident: Resident,
    held_out: Corpus,
    texts: Sequence[Corpus] = (),
    *,
    progress: Progress,
) -> Quality:
    """Measure a recipe's model.

    Args:
        resident: the recipe's base.
        held_out: sequences that nothing is trained on.
        texts: further texts for perplexities.

    Raises:
        UserError: a loss is not finite.
    """
    chain = Chain(recipe, resident)
    batch_tokens = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
    found = [perplexity(chain, text, batch_tokens=batch_tokens, progress=progress) for text in (held_out, *texts)]
    errors = _errors(recipe, chain, resident, held_out, batch_tokens)
    return Quality(texts=tuple(found), errors=tuple(errors))


@torch.inference_mode()
def _errors(recipe: Recipe, chain: Chain, resident: Resident, corpus: Corpus, batch_tokens: int) -> list[float]:
    wanted: Mapping[int, list[int]] = {
        depth: [index for index, (_, stop) in enumerate(recipe.spans) if stop == depth]
        for depth in range(recipe.depth + 1)
    }
    sums = [0.0] * len(recipe.layers)
    tokens = 0
    for ids_BT, mask_BT in corpus.batches(max(1, batch_tokens // corpus.seq_len)):
        ids_BT = ids_BT.to(resident.device)
        mask_BT = None if mask_BT is None else mask_BT.to(resident.device)
        found = chain.hidden(ids_BT, mask_BT)
        real = ids_BT.numel() if mask_BT is None else int(mask_BT.sum())
        tokens += real
        entry = chain.stream.enter(ids_BT, mask_BT)
        h_BTD = entry.h_BTD
        for depth in range(recipe.depth + 1):
            for index in wanted[depth]:
                sums[index] += float(hidden_mse(h_BTD, found[index], mask_BT)) * real
            if depth < recipe.depth:
                h_BTD = chain.stream.run(resident.layers[depth], h_BTD, entry.calls[depth])
    return [total / max(tokens, 1) for total in sums]
