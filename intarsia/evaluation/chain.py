"""A recipe's layers between the original's embedding and head. Nothing is built, and nothing is copied.

Shape suffixes: `B` sequences, `T` tokens, `W` all windows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from intarsia.activations.hidden_store import HiddenStore, Room
from intarsia.activations.loop import Batches
from intarsia.activations.loss import next_token_losses
from intarsia.activations.stream import LayerStream
from intarsia.building.loaded_model import Resident
from intarsia.data.corpus import Corpus
from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Recipe

STREAMED_LOGIT_BYTES = 128 * 1024**2


class Chain(nn.Module):
    """The recipe's model, callable like a causal language model."""

    def __init__(self, recipe: Recipe, resident: Resident, *, room: Room | None = None) -> None:
        """
        Args:
            room: what hidden states of a whole text may take, where the model is streamed.
        """
        super().__init__()
        self.stream = LayerStream(resident.model, resident.architecture)
        self.sources = [op.sources[0].layer for op in recipe.layers]
        self.chain = nn.ModuleList(
            resident.module(op, recipe.fitted.get(index)) for index, op in enumerate(recipe.layers)
        )
        self.streams = resident.streams
        self._resident = resident
        self._room = room
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

    def through(
        self, batches: Batches, states: HiddenStore, behind: Callable[[int], None] = lambda index: None
    ) -> None:
        """Run a text through, layer after layer, so that each is read once; H^L is then in `states` at depth 0.

        Args:
            behind: called behind every layer.
        """

        def enter(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
            states.put(0, rows.start, self.stream.enter(ids, mask).h_BTD)

        batches.each(enter)
        for index, (module, source) in enumerate(zip(self._resident.walk(self.chain), self.sources, strict=True)):

            def work(
                rows: slice, ids: Tensor, mask: Tensor | None, module: nn.Module = module, source: int = source
            ) -> None:
                h_BTD = states.get(0, rows.start, rows.stop, self._resident.device)
                states.put(0, rows.start, self.stream.run(module, h_BTD, self.stream.calls(ids, mask)[source]))

            batches.each(work)
            behind(index)

    @torch.inference_mode()
    def window_losses(
        self, corpus: Corpus, *, batch_tokens: int, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed loss (float64, nats) and predicted tokens (int64) of every window, on the CPU, layer by layer."""
        progress = progress or Silent()
        batches = Batches(corpus, self._resident.device, batch_tokens=batch_tokens, progress=progress)
        shape = (len(corpus), corpus.seq_len, self._resident.architecture.width)
        states = HiddenStore(shape, self._resident.model.dtype, room=self._room)
        sums_W = torch.zeros(len(corpus), dtype=torch.float64)
        counts_W = torch.zeros(len(corpus), dtype=torch.int64)

        def lose(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
            h_BTD = states.get(0, rows.start, rows.stop, self._resident.device)
            logits = self.stream.logits(h_BTD, ids, mask)
            found = next_token_losses(logits, ids, mask, where=f"perplexity on {corpus.description}")
            sums_W[rows], counts_W[rows] = found[0].cpu(), found[1].cpu()

        # Fewer where the vocabulary is large: logits of a batch, beside the whole head, may take more than two layers.
        rows_bytes = corpus.seq_len * self._resident.architecture.vocabulary * self._resident.model.dtype.itemsize
        few = min(batch_tokens, max(1, STREAMED_LOGIT_BYTES // rows_bytes) * corpus.seq_len)
        losing = Batches(corpus, self._resident.device, batch_tokens=few, progress=progress)
        try:
            with progress.task("perplexity", len(self.sources) + 1) as task:
                self.through(batches, states, lambda _: task.advance())
                losing.each(lose)
        finally:
            states.close()
        return sums_W, counts_W
