"""How the workers of a search open its family, and when a trial is healed before it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Recipe
from intarsia.stages.setup import device_of, dtype_of
from intarsia.tailoring.family import Family, open_family
from intarsia.tailoring.family_file import FamilyFile
from intarsia.tailoring.history import Outcome
from intarsia.tailoring.trial_heal import KeptFits
from intarsia.tailoring.workers import Place

if TYPE_CHECKING:
    from intarsia.tailoring.evaluator import Evaluator


@dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens the family where a worker is. Paths are absolute, so the worker may have been started elsewhere."""

    file: FamilyFile
    device: str | None
    dtype: str | None
    memory_bytes: int | None
    fits: Path | None = None

    def __call__(self, place: Place) -> TrialScorer:
        """A scorer for a worker: with its share of the memory, on its own GPU where there are several."""
        if place.threads is not None:
            torch.set_num_threads(place.threads)
        device = self.device
        if place.count > 1 and device_of(device).type == "cuda" and (device is None or ":" not in device):
            device = f"cuda:{place.index % torch.cuda.device_count()}"
        memory = None if self.memory_bytes is None else self.memory_bytes // place.count
        family = open_family(self.file.base, self.file.variants)
        evaluator = evaluator_of(
            family, self.file, device=device, dtype=self.dtype, memory_bytes=memory, probe=False, fits=self.fits
        )
        return TrialScorer(evaluator, self.file)


def evaluator_of(
    family: Family,
    file: FamilyFile,
    *,
    device: str | None,
    dtype: str | None,
    memory_bytes: int | None,
    probe: bool = True,
    fits: Path | None = None,
    progress: Progress | None = None,
) -> Evaluator:
    """The evaluator of a family for its objectives.

    Args:
        probe: measure the base, and refuse objectives that tell nothing.
        fits: the folder of what is fitted for trials (`intarsia.tailoring.trial_heal`).

    Raises:
        UserError: an objective cannot be used.
    """
    from intarsia.tailoring.evaluator import open_evaluator

    return open_evaluator(
        family,
        file,
        device=device_of(device),
        dtype=dtype_of(dtype),
        memory_bytes=memory_bytes,
        probe=probe,
        fits=None if fits is None else KeptFits(fits),
        progress=progress or Silent(),
    )


class TrialScorer:
    """Scores the recipes of a search, healed where the family file says so."""

    def __init__(self, evaluator: Evaluator, file: FamilyFile) -> None:
        self.evaluator = evaluator
        self._file = file

    def evaluate(self, recipe: Recipe, budget: int) -> Outcome:
        """See `intarsia.tailoring.workers.Scorer`."""
        if is_healed(self._file, budget):
            return self.evaluator.evaluate(recipe, budget, healed=True)
        return self.evaluator.evaluate(recipe, budget)

    def close(self) -> None:
        """Let go of what is cached."""
        self.evaluator.close()


def is_healed(file: FamilyFile, budget: int) -> bool:
    """Whether a trial at this budget is healed before it is scored: every one, or those at the greatest budget."""
    return file.heal == "every" or (file.heal == "finalists" and budget >= file.search.max_budget)
