"""The scores of recipes on examples, batch by batch, each computed once.

How far a candidate's next tokens are from the base's is measured with little kept of the base: of each position its
`TOP` likeliest tokens, 8 bytes each, and the rest as one bucket. Keeping the base's hidden state instead would cost
another product with the head a trial, as much time as several layers. The divergence over these outcomes is a lower
bound of the full one, and 0 where the full one is.

Shapes: N positions, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intarsia.activations.loss import Likeliest
from intarsia.evaluation.likelihood import Batch, score_batch
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.history import TrialFailed
from intarsia.tailoring.objective import Objective, Segment, segments
from intarsia.tailoring.trial_run import ByteCache, Runner, path_of

_RESULT_BYTES = 32 * 1024 * 1024
_RESULT_OVERHEAD = 400  # bytes of a small array with its key

Values = npt.NDArray[np.float64]
BatchId = tuple[int, int, int, int]
"""Number of the objective, its segment's two ends, and the number of the batch in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A batch; the numbers of its requests in its segment; of every scored token the place of its request in these."""

    id: BatchId
    batch: Batch
    request_U: npt.NDArray[np.int64]
    place_M: Tensor

    @property
    def tokens(self) -> int:
        """With padding."""
        return self.batch.rows.ids_BT.numel()


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Of one recipe at one budget."""

    # Each example's score, by objective.
    examples: tuple[Values, ...]
    # Of an objective of questions whether each is answered rightly, else None.
    right: tuple[Values | None, ...]
    # Layer-forwards times tokens that were run for it; tokens of the budget.
    work: int
    tokens: int


class Scorer:
    """Scores recipes on the first examples of objectives."""

    def __init__(
        self,
        runner: Runner,
        objectives: Sequence[Objective],
        *,
        cuts: Sequence[int],
        pack: bool,
        batch_tokens: int,
        uncut: Recipe,
    ) -> None:
        """Ready to score.

        Args:
            cuts: the budgets that are expected; examples between two of them are run together.
            pack: whether the model takes rows of several continuations.
            batch_tokens: rows times columns of a batch, at most.
            uncut: the base as it is, from which divergences are taken.
        """
        self._runner, self._objectives, self._uncut = runner, tuple(objectives), uncut
        self._cuts, self._pack, self._batch_tokens = tuple(cuts), pack, batch_tokens
        self._batches: dict[tuple[int, Segment], tuple[Prepared, ...]] = {}
        self._base: dict[BatchId, Likeliest] = {}
        self._results: ByteCache[tuple[str, BatchId], Values] = ByteCache(_RESULT_BYTES)

    def clear(self) -> None:
        """Drop all caches."""
        self._batches.clear()
        self._base.clear()
        self._results.clear()

    def score(self, recipe: Recipe, budget: int) -> Scored:
        """The scores of every objective's examples within a budget."""
        segments_of = [list(self._segments(number, budget)) for number in range(len(self._objectives))]
        everything = [one for found in segments_of for _, batches in found for one in batches]
        tokens = sum(one.tokens for one in everything)
        # What divergences are taken from.
        unknown = [one for one in everything if self._measures_kl(one) and one.id not in self._base]
        for one, logits_NV in zip(unknown, self._logits(self._uncut, unknown, tokens), strict=True):
            self._base[one.id] = Likeliest.of(logits_NV)
        work = self._runner.work
        key = path_of(recipe)[-1]
        found = {one.id: self._results.get((key, one.id)) for one in everything}
        new = [one for one in everything if found[one.id] is None]
        for one, logits_NV in zip(new, self._logits(recipe, new, tokens), strict=True):
            values_U = found[one.id] = self._values(one, logits_NV)
            self._results.put((key, one.id), values_U, values_U.nbytes + _RESULT_OVERHEAD)
        values = [
            np.concatenate([self._joined(number, *entry, found) for entry in entries])
            for number, entries in enumerate(segments_of)
        ]
        both = list(zip(self._objectives, values, strict=True))
        return Scored(
            examples=tuple(objective.scores(values_R) for objective, values_R in both),
            right=tuple(objective.right(values_R) for objective, values_R in both),
            work=self._runner.work - work,
            tokens=tokens,
        )

    def _segments(self, number: int, budget: int) -> Iterator[tuple[Segment, tuple[Prepared, ...]]]:
        """An objective's batches for a budget, segment by segment."""
        objective = self._objectives[number]
        for segment in segments(objective.count(budget), self._cuts):
            if (number, segment) not in self._batches:
                made = objective.batches(segment, pack=self._pack, batch_tokens=self._batch_tokens)
                self._batches[number, segment] = tuple(
                    _prepared((number, *segment, place), batch) for place, batch in enumerate(made)
                )
            yield segment, self._batches[number, segment]

    def _measures_kl(self, one: Prepared) -> bool:
        return self._objectives[one.id[0]].measure == "kl"

    def _logits(self, recipe: Recipe, batches: Sequence[Prepared], tokens: int) -> Iterator[Tensor]:
        rows = [(one.id, one.batch.rows) for one in batches]
        return self._runner.logits(recipe, path_of(recipe), rows, tokens=tokens)

    def _values(self, one: Prepared, logits_NV: Tensor) -> Values:
        """Of every request of a batch its log-likelihood, or its divergence from the base."""
        if self._measures_kl(one):
            value_N = self._base[one.id].divergence(logits_NV)
            value_M = value_N[one.batch.position_M.to(value_N.device)]
        else:
            value_M, _ = score_batch(logits_NV, one.batch)
        value_M = value_M.cpu().double()
        if not bool(value_M.isfinite().all()):
            raise TrialFailed(f"NaN or infinity in {self._objectives[one.id[0]].name}")
        sums_U = torch.zeros(len(one.request_U), dtype=torch.float64)
        return sums_U.index_add_(0, one.place_M, value_M).numpy()

    def _joined(
        self, number: int, segment: Segment, batches: Sequence[Prepared], found: dict[BatchId, Values | None]
    ) -> Values:
        """The value of every request of a segment."""
        examples = self._objectives[number].examples[slice(*segment)]
        values_R = np.full(sum(len(example.requests) for example in examples), np.nan)
        for one in batches:
            values_R[one.request_U] = found[one.id]
        return values_R


def _prepared(number: BatchId, batch: Batch) -> Prepared:
    request_U, place_M = np.unique(batch.request_M.numpy(), return_inverse=True)
    return Prepared(id=number, batch=batch, request_U=request_U, place_M=torch.from_numpy(place_M))
