"""Methods that score every layer once, on the whole model, and drop the layers of least score one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from intarsia.architecture.spec import Architecture
from intarsia.pruning.step import Planner, Step

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate


class OneShot(Planner):
    """Removal in the order of a score; of equal scores the lower layer goes first."""

    # Passes over the calibration text that `score` takes, with the one that measures the model; 0: weights suffice.
    passes = 1
    # How many of the first and of the last original layers are never dropped.
    protect = (0, 0)
    # What the scores are called in the log.
    scored = "scores"

    @property
    def measures(self) -> bool:  # type: ignore[override]
        """Whether the whole model is measured first."""
        return self.passes > 0

    def score(self, model: Intermediate) -> list[float]:
        """One number a layer of the whole model; what is small is dropped first."""
        raise NotImplementedError

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> list[Step]:
        """Drop the layer of least score among those left that may go."""
        scores: list[float] = history[0][self.scored] if history else self.score(model)
        first, last = self.protect
        left = [op.sources[0].layer for op in model.ops]
        free = [index for index, layer in enumerate(left) if first <= layer < len(scores) - last]
        if not free:
            return []
        start = min(free, key=lambda index: (scores[left[index]], left[index]))
        evidence: dict[str, Any] = {"dropped": left[start], "score": scores[left[start]]}
        if not history:
            evidence[self.scored] = scores
        return [Step(start=start, count=1, op=None, evidence=evidence)]

    def reason(self) -> str:
        """Why nothing more can be dropped."""
        first, last = self.protect
        return f"this method never drops the first {first} and the last {last} layers, and no others are left"

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> int:
        """Those of the score."""
        return self.passes * architecture.n_layers
