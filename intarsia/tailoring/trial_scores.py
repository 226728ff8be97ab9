"""How far a candidate's next tokens are from the base's, with little kept of the base.

Of each position the base's `TOP` likeliest tokens are kept, 8 bytes each, and the rest is one bucket. Keeping the
base's hidden state instead would cost another product with the head a trial, as much time as several layers.
The divergence over these outcomes is a lower bound of the full one, and 0 where the full one is.

Shapes: N positions, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intarsia.evaluation.likelihood import Batch, score_batch
from intarsia.healing.losses import top_k_kl, top_k_of
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.history import TrialFailed
from intarsia.tailoring.objective import Objective, Segment, segments
from intarsia.tailoring.trial_run import ByteCache, Runner, path_of

TOP = 64
_CPU_ROWS = 32
_GPU_ROWS = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """Of every position the base's likeliest tokens: `log_p_NK` (float32) and `index_NK` (int32)."""

    log_p_NK: Tensor
    index_NK: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor) -> Teacher:
        """From the base's logits."""
        kept = [top_k_of(block_NV, min(TOP, block_NV.shape[-1])) for block_NV in logits_NV.split(_rows(logits_NV))]
        return cls(
            log_p_NK=torch.cat([log_p for log_p, _ in kept]),
            index_NK=torch.cat([index for _, index in kept]).to(torch.int32),
        )

    def divergence(self, logits_NV: Tensor) -> Tensor:
        """Of every position, in nats: float32 `[N]`."""
        step = _rows(logits_NV)
        blocks = zip(self.log_p_NK.split(step), self.index_NK.split(step), logits_NV.split(step), strict=True)
        return torch.cat([top_k_kl(log_p_NK, index_NK, block_NV) for log_p_NK, index_NK, block_NV in blocks])


def _rows(logits_NV: Tensor) -> int:
    return _CPU_ROWS if logits_NV.device.type == "cpu" else _GPU_ROWS


_RESULT_BYTES = 32 * 1024 * 1024
_RESULT_OVERHEAD = 400  # bytes of a small array with its key

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
    """Of one recipe at one budget.

    Attributes:
        examples: each example's score, by objective.
        right: of an objective of questions whether each is answered rightly, else None.
        work: layer-forwards times tokens that were run for it; `tokens` of the budget.
    """

    examples: tuple[npt.NDArray[np.float64], ...]
    right: tuple[npt.NDArray[np.float64] | None, ...]
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
            cuts: where budgets are expected; see `intarsia.tailoring.objective`.
            pack: whether the model takes rows of several continuations.
            batch_tokens: rows times columns of a batch, at most.
            uncut: the base as it is, from which divergences are taken.
        """
        self._runner = runner
        self._objectives = tuple(objectives)
        self._cuts, self._pack, self._batch_tokens = tuple(cuts), pack, batch_tokens
        self._uncut = uncut
        self._batches: dict[tuple[int, Segment], tuple[Prepared, ...]] = {}
        self._teachers: dict[BatchId, Teacher] = {}
        self._results: ByteCache[tuple[str, BatchId], npt.NDArray[np.float64]] = ByteCache(_RESULT_BYTES)

    def prepared(self, budget: int) -> list[Prepared]:
        """All batches of a budget."""
        numbers = range(len(self._objectives))
        return [one for number in numbers for _, found in self._segments(number, budget) for one in found]

    def clear(self) -> None:
        """Drop all caches."""
        self._batches.clear()
        self._teachers.clear()
        self._results.clear()

    def score(self, recipe: Recipe, budget: int) -> Scored:
        """The scores of every objective's examples within a budget.

        Raises:
            TrialFailed: something is not finite.
        """
        batches = [list(self._segments(number, budget)) for number in range(len(self._objectives))]
        everything = self.prepared(budget)
        tokens = sum(one.tokens for one in everything)
        self._teach(everything, tokens)
        path = path_of(recipe)
        self._runner.begin(recipe, path, tokens=tokens)
        try:
            values = [
                np.concatenate([self._segment_values(number, path[-1], *entry) for entry in found])
                for number, found in enumerate(batches)
            ]
            both = list(zip(self._objectives, values, strict=True))
            return Scored(
                examples=tuple(objective.scores(values_R) for objective, values_R in both),
                right=tuple(objective.right(values_R) for objective, values_R in both),
                work=self._runner.work,
                tokens=tokens,
            )
        finally:
            self._runner.end()

    def _segments(self, number: int, budget: int) -> Iterator[tuple[Segment, tuple[Prepared, ...]]]:
        """An objective's batches for a budget, segment by segment."""
        objective = self._objectives[number]
        for segment in segments(objective.count(budget), self._cuts):
            if (number, segment) not in self._batches:
                made = objective.batches(segment, pack=self._pack, batch_tokens=self._batch_tokens)
                self._batches[number, segment] = tuple(
                    _prepare((number, *segment, place), batch) for place, batch in enumerate(made)
                )
            yield segment, self._batches[number, segment]

    def _segment_values(
        self, number: int, key: str, segment: Segment, batches: Sequence[Prepared]
    ) -> npt.NDArray[np.float64]:
        """The value of every request of a segment."""
        examples = self._objectives[number].examples[slice(*segment)]
        values_R = np.full(sum(len(example.requests) for example in examples), np.nan)
        for prepared in batches:
            found_U = self._results.get((key, prepared.id))
            if found_U is None:
                found_U = self._values(number, prepared)
                self._results.put((key, prepared.id), found_U, found_U.nbytes + _RESULT_OVERHEAD)
            values_R[prepared.request_U] = found_U
        return values_R

    def _values(self, number: int, prepared: Prepared) -> npt.NDArray[np.float64]:
        """Of every request of a batch its log-likelihood, or its divergence from the base."""
        logits_NV = self._runner.logits(prepared.id, prepared.batch.rows)
        if self._objectives[number].measure == "kl":
            value_N = self._teachers[prepared.id].divergence(logits_NV)
            value_M = value_N[prepared.batch.position_M.to(value_N.device)]
        else:
            value_M, _ = score_batch(logits_NV, prepared.batch)
        value_M = value_M.cpu().double()
        if not bool(value_M.isfinite().all()):
            raise TrialFailed(f"NaN or infinity in {self._objectives[number].name}")
        sums_U = torch.zeros(len(prepared.request_U), dtype=torch.float64)
        return sums_U.index_add_(0, prepared.place_M, value_M).numpy()

    def _teach(self, batches: Sequence[Prepared], tokens: int) -> None:
        """See that what divergences are taken from is known."""
        missing = [
            one for one in batches if self._objectives[one.id[0]].measure == "kl" and one.id not in self._teachers
        ]
        if not missing:
            return
        self._runner.begin(self._uncut, tokens=tokens)
        for one in missing:
            self._teachers[one.id] = Teacher.of(self._runner.logits(one.id, one.batch.rows))
        self._runner.end()


def _prepare(number: BatchId, batch: Batch) -> Prepared:
    request_U, place_M = np.unique(batch.request_M.numpy(), return_inverse=True)
    return Prepared(id=number, batch=batch, request_U=request_U, place_M=torch.from_numpy(place_M))
