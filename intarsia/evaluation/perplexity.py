"""Perplexity, and recipes' models in memory: layers between the original's embedding and head, without copies.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width, `W` all windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import End, Loop, Path
from intarsia.activations.loss import next_token_losses
from intarsia.activations.stream import LayerStream
from intarsia.building.loaded_model import LoadedModel, RecipeLayers
from intarsia.building.materialize import assembled
from intarsia.data.corpus import Corpus, tokenize
from intarsia.data.sources import bytes_for, documents
from intarsia.errors import UserError
from intarsia.evaluation.likelihood import evaluating
from intarsia.evaluation.results import Perplexity
from intarsia.options import PerplexityTexts
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe, Variant, identity


class Chain(nn.Module):
    """The recipe's model, run layer by layer over a whole text."""

    def __init__(self, recipe: Recipe, resident: LoadedModel, *, memory_budget: MemoryBudget | None = None) -> None:
        """
        Args:
            memory_budget: of a whole text's hidden states, if the model is streamed.
        """
        super().__init__()
        self.layers = RecipeLayers.of(recipe, resident)
        self.chain = nn.ModuleList(self.layers.modules)  # for its parameters
        self.stream = LayerStream(resident.model, resident.architecture)
        self._memory_budget = memory_budget
        self.eval()

    @torch.inference_mode()
    def window_losses(self, corpus: Corpus, *, batch_tokens: int) -> tuple[Tensor, Tensor]:
        """Summed loss (float64, nats) and predicted tokens (int64) of every window, on the CPU."""
        sums_W = torch.zeros(len(corpus), dtype=torch.float64)
        counts_W = torch.zeros(len(corpus), dtype=torch.int64)

        def end(_: int, rows: slice, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
            where = f"perplexity on {corpus.description}"
            sums_W[rows], counts_W[rows] = self.stream.losses(h_BTD, ids, mask, where=where)

        self._once(corpus, end, "perplexity", batch_tokens)
        return sums_W, counts_W

    @torch.inference_mode()
    def row_logits(self, rows: Sequence[Sequence[int]], take: Callable[[int, Tensor], None]) -> None:
        """Run once over rows of any lengths; `take` gets the number of each row and its logits `[T, V]`."""
        ids_NT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        corpus = Corpus.of(ids_NT, description="answers", documents=len(rows))  # causal: padding has no effect

        def end(_: int, part: slice, ids: Tensor, mask: Tensor | None, h_BTD: Tensor) -> None:
            for place, number in enumerate(range(part.start, part.stop)):
                own = (slice(place, place + 1), slice(len(rows[number])))
                take(number, self.stream.logits(h_BTD[own], ids[own], None)[0])

        self._once(corpus, end, "agreement", 4096)

    def _once(self, corpus: Corpus, end: End, name: str, batch_tokens: int) -> None:
        """Run once over a text."""
        resident = self.layers.resident
        batches = Batches(corpus, resident.device, batch_tokens=batch_tokens)
        loop = Loop(resident, batches, memory_budget=self._memory_budget)
        with current().task(name, self.layers.depth) as task:
            loop.run([Path(layers=self.layers.placed())], end, advance=task.advance)


def model_of(recipe: Recipe | None, resident: LoadedModel, *, memory_budget: MemoryBudget | None = None) -> nn.Module:
    """A recipe's model for measuring: a transformers model, or a chain if layers are streamed.

    Args:
        recipe: over the resident model; None for that model itself.
    """
    if not resident.streams:
        return resident.model if recipe is None else assembled(recipe, resident)
    checkpoint = resident.checkpoint
    whole = identity(Variant(name="base", model=checkpoint.model), checkpoint.architecture.n_layers)
    return Chain(recipe or whole, resident, memory_budget=memory_budget)


def eval_corpora(texts: PerplexityTexts, tokenizer: Any, *, seq_len: int) -> dict[str, Corpus]:
    """The evaluation texts by name.

    Raises:
        UserError: a text cannot be used.
    """
    windows = texts.windows * len(texts.text) if len(texts.windows) == 1 else texts.windows
    return {
        name: eval_corpus(source, tokenizer, seq_len=seq_len, windows=count)
        for (name, source), count in zip(texts.sources.items(), windows, strict=True)
    }


def eval_corpus(spec: str, tokenizer: Any, *, seq_len: int = 512, windows: int | None = 64) -> Corpus:
    """The first windows of a text, in order.

    Args:
        spec: a text source (see `intarsia.data.sources`).
        windows: most windows; 0 or None for all.

    Raises:
        UserError: the source cannot be used, or is shorter than one window.
    """
    return tokenize(
        documents(spec, limit_bytes=bytes_for(windows * seq_len) if windows else None),
        tokenizer,
        tokens=seq_len * (windows or 2**40),
        seq_len=seq_len,
        shuffle=False,
        description=spec,
        least=1,
    )


def perplexity(model: torch.nn.Module, corpus: Corpus, *, batch_tokens: int = 4096) -> Perplexity:
    """Measure the perplexity of a causal language model of `transformers` on a corpus.

    Args:
        model: on its device and in its dtype; its mode (training or not) is restored. The layers of a streamed one are
            read once.

    Raises:
        UserError: a loss is NaN or infinite, or there are no predicted tokens.
    """
    if isinstance(model, Chain):
        sums_W, counts_W = model.window_losses(corpus, batch_tokens=batch_tokens)
    else:
        sums_W, counts_W = window_losses(model, corpus, batch_tokens=batch_tokens)
    tokens = int(counts_W.sum())
    if tokens == 0:
        raise UserError(
            f"No window of {corpus.description} has two tokens, so there is nothing to predict.",
            "Use longer windows or another text.",
        )
    nll = float(sums_W.sum()) / tokens
    nll_stderr = ratio_stderr(sums_W, counts_W, nll)
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

    This allows to compare two models on the same corpus window by window.
    """
    device, where = next(model.parameters()).device, f"perplexity on {corpus.description}"
    sums, counts = [], []
    with evaluating(model), torch.inference_mode(), current().task("perplexity", total=len(corpus)) as task:
        for ids_BT, mask_BT in corpus.batches(max(1, batch_tokens // corpus.seq_len)):
            ids_BT = ids_BT.to(device)
            mask_BT = None if mask_BT is None else mask_BT.to(device)
            # The model's own logits, which include everything after its last hidden state.
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            sums_B, counts_B = next_token_losses(logits_BTV, ids_BT, mask_BT, where=where)
            sums.append(sums_B.cpu())
            counts.append(counts_B.cpu())
            task.advance(len(ids_BT))
    return torch.cat(sums), torch.cat(counts)


def ratio_stderr(sums_W: Tensor, counts_W: Tensor, mean: float) -> float:
    """Standard error of sum(sums) / sum(counts), with windows as independent draws."""
    n = len(sums_W)
    if n < 2:
        return 0.0
    residuals_W = sums_W - mean * counts_W
    return float((residuals_W.square().sum() / (n * (n - 1))).sqrt() / counts_W.double().mean())
