"""Scores candidates of a family, with everything that they share in memory.

No checkpoint is written and no model is loaded a second time. A trial runs what is new in it: layers behind the
prefix that it shares with an earlier one, on examples that it was not run on yet. Each number is a function of the
recipe and the budget alone: on the CPU it is the same to the last bit whatever was in the caches.

Layers are made from the same tensors as a built folder's, and likelihoods by the functions that judge it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.errors import UserError
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.recipe.validate import check
from intarsia.tailoring.kept_fits import KeptFits
from intarsia.tailoring.objective import Objective, check_varied
from intarsia.tailoring.outcome import Outcome, TrialFailed
from intarsia.tailoring.resident_family import ResidentFamily
from intarsia.tailoring.trial_repair import repair_work, repaired
from intarsia.tailoring.trial_run import Runner
from intarsia.tailoring.trial_scores import Scored, Scorer

__all__ = ["Evaluator", "Outcome", "TrialFailed"]


class Evaluator:
    """Scores recipes over one family; see `intarsia.tailoring.open_evaluator`.

    Attributes:
        objectives: their names, in the order of the costs.
        most: the largest budget; an objective with fewer examples is measured on all that it has.
        measured: the objectives, with their examples.
        runner: runs the family's layers.
        base: what the uncut base costs at the largest budget of the search; None where that was not measured.
    """

    def __init__(
        self,
        layers: ResidentFamily,
        objectives: Sequence[Objective],
        *,
        cuts: Sequence[int],
        pack: bool,
        batch_tokens: int,
        cache_bytes: int,
        repair_on: Corpus | None = None,
        fits: KeptFits | None = None,
    ) -> None:
        """Most callers want `open_evaluator`.

        Args:
            cuts, pack, batch_tokens: see `Scorer`.
            cache_bytes: for states and arguments; layers have a cache of their own.
            repair_on: tokens for the closed form, where candidates may be healed.
            fits: where what was fitted is kept, and found again.
        """
        self.objectives = tuple(objective.name for objective in objectives)
        self.most = max(len(objective.examples) for objective in objectives)
        self.base: Outcome | None = None
        self.measured = tuple(objectives)
        self._layers = layers
        self._repair_on, self._fits = repair_on, fits
        self.runner = Runner(layers, prefix_bytes=cache_bytes * 3 // 4, entry_bytes=cache_bytes // 4)
        self._scorer = Scorer(
            self.runner, objectives, cuts=cuts, pack=pack, batch_tokens=batch_tokens, uncut=self.uncut()
        )

    @property
    def data(self) -> Mapping[str, str]:
        """The hash of each objective's examples in their order: costs are comparable where these are the same."""
        return {objective.name: objective.sha256 for objective in self.measured}

    @property
    def resident(self) -> Resident:
        """The base in memory, from which layers of any recipe over the family can be made."""
        return self._layers.resident

    def evaluate(self, recipe: Recipe, budget: int, *, healed: bool = False) -> Outcome:
        """What a recipe costs on the first `budget` examples of every objective.

        Args:
            recipe: over the family, its variants called as the family's members are.
            healed: fit its read-outs first, in closed form.

        Raises:
            TrialFailed: something is not finite, or memory does not suffice.
            UserError: there is no such budget, or the recipe is none of this family.
        """
        start = time.perf_counter()
        self._check(recipe, budget)
        made = self._layers.made
        with self._failing():
            fitting = 0.0
            if healed:
                recipe, fitting = self._repaired(recipe)
            scored = self._scorer.score(recipe, budget)
        return self._outcome(scored, fitting, len(recipe.layers), self._layers.made - made, start)

    def heal(self, recipe: Recipe) -> Recipe:
        """The recipe that `evaluate` scores with `healed`, its fitted tensors in it.

        Raises:
            TrialFailed: activations are not finite, or memory does not suffice.
        """
        with self._failing():
            return self._repaired(recipe)[0]

    def probe(self, budget: int) -> None:
        """Measure the uncut base, and refuse objectives that tell nothing.

        Raises:
            UserError: the base cannot be scored, or naming these objectives.
        """
        start, uncut = time.perf_counter(), self.uncut()
        try:
            with self._failing():
                scored = self._scorer.score(uncut, budget)
        except TrialFailed as error:
            raise UserError.of(
                where="the family's base",
                expected="a model that can be scored on every objective",
                found=error.reason,
                remedy="Use bfloat16 or float32, a smaller model, or more memory.",
            ) from error
        check_varied(self.measured, dict(zip(self.objectives, scored.examples, strict=True)))
        self.base = self._outcome(scored, 0.0, len(uncut.layers), 0, start)

    def uncut(self) -> Recipe:
        """The base as it is, as a recipe."""
        resident = self._layers.resident
        return identity(
            Variant(name=self._layers.base, model=resident.checkpoint.model), resident.architecture.n_layers
        )

    def close(self) -> None:
        """Let go of all that is cached."""
        self.runner.clear()
        self._scorer.clear()

    def _check(self, recipe: Recipe, budget: int) -> None:
        if not 1 <= budget <= self.most:
            raise UserError.of(
                where="budget",
                expected=f"1 to {self.most} examples",
                found=str(budget),
                remedy="Choose another budget, or widen the objectives' splits.",
            )
        architecture = self._layers.resident.architecture
        check(recipe, dict.fromkeys((self._layers.base, *self._layers.resident.others), architecture))

    def _repaired(self, recipe: Recipe) -> tuple[Recipe, float]:
        assert self._repair_on is not None, "opened for candidates that are healed"
        work = repair_work(recipe, self._layers, self._repair_on)
        healed = None if self._fits is None else self._fits.find(recipe)
        if healed is None:
            healed = repaired(recipe, self._layers, self._repair_on)
            if self._fits is not None:
                self._fits.keep(recipe, healed)
        return healed, work

    def _outcome(self, scored: Scored, fitting: float, depth: int, made: int, start: float) -> Outcome:
        pairs = [objective.cost(found) for objective, found in zip(self.measured, scored.examples, strict=True)]
        wrong = [name for name, (cost, _) in zip(self.objectives, pairs, strict=True) if not np.isfinite(cost)]
        if wrong:
            raise TrialFailed(f"NaN or infinity in {', '.join(wrong)}")
        details: dict[str, Any] = {
            "stderr": [stderr for _, stderr in pairs],
            "accuracy": {
                name: (float(right.mean()), float(right.std(ddof=1) / np.sqrt(len(right))) if len(right) > 1 else 0.0)
                for name, right in zip(self.objectives, scored.right, strict=True)
                if right is not None
            },
            "tokens": scored.tokens,
            "reused": 1.0 - scored.work / scored.tokens / depth,
            "layers_made": made,
        }
        return Outcome(
            costs=tuple(cost for cost, _ in pairs),
            examples=tuple(map(len, scored.examples)),
            layer_forwards=(scored.work + fitting) / scored.tokens,
            seconds=time.perf_counter() - start,
            details=details,
        )

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What makes a trial fail, as `TrialFailed`; after a lack of memory the caches are empty."""
        try:
            with torch.inference_mode():
                yield
        except UserError as error:  # the recipe was checked before: something is not finite
            raise TrialFailed(str(error)) from error
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _lacks_memory(error):
                raise
            self.runner.clear()
            raise TrialFailed(f"out of memory: {(str(error).splitlines() or [''])[0]}") from error


def _lacks_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory does not suffice."""
    words = str(error)
    wide = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return wide or "out of memory" in words or "can't allocate memory" in words
