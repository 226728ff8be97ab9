"""A recipe's layers between the original's embedding and head. Nothing is built, and nothing is copied.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width, `W` all windows.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import Room
from intarsia.activations.loop import Loop, Path
from intarsia.activations.stream import LayerStream
from intarsia.building.loaded_model import Resident
from intarsia.building.recipe_layers import RecipeLayers
from intarsia.data.corpus import Corpus
from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Recipe


class Chain(nn.Module):
    """The recipe's model, callable like a causal language model."""

    def __init__(self, recipe: Recipe, resident: Resident, *, room: Room | None = None) -> None:
        """
        Args:
            room: what hidden states of a whole text may take, where the model is streamed.
        """
        super().__init__()
        self.layers = RecipeLayers.of(recipe, resident)
        self.chain = nn.ModuleList(self.layers.modules)  # for its parameters
        self.stream = LayerStream(resident.model, resident.architecture)
        self._room = room
        self.eval()

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor | None) -> list[Tensor]:
        """The residual stream after every layer."""
        entry = self.stream.enter(ids_BT, mask_BT)
        h_BTD, found = entry.h_BTD, []
        for module, source in self.layers.placed():
            h_BTD = self.stream.run(module, h_BTD, entry.calls[source])
            found.append(h_BTD)
        return found

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        """Logits, as transformers gives them."""
        h_BTD = self.hidden(input_ids, attention_mask)[-1]
        return SimpleNamespace(logits=self.stream.logits(h_BTD, input_ids, attention_mask))

    @torch.inference_mode()
    def window_losses(
        self, corpus: Corpus, *, batch_tokens: int, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed loss (float64, nats) and predicted tokens (int64) of every window, on the CPU."""
        progress = progress or Silent()
        resident = self.layers.resident
        batches = Batches(corpus, resident.device, batch_tokens=batch_tokens, progress=progress)
        loop = Loop(resident, batches, room=self._room)
        sums_W = torch.zeros(len(corpus), dtype=torch.float64)
        counts_W = torch.zeros(len(corpus), dtype=torch.int64)

        def end(_: int, rows: slice, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
            where = f"perplexity on {corpus.description}"
            sums_W[rows], counts_W[rows] = loop.stream.losses(h_BTD, ids, mask, where=where)

        with progress.task("perplexity", self.layers.depth) as task:
            loop.run([Path(layers=self.layers.placed())], end, advance=task.advance)
        return sums_W, counts_W
