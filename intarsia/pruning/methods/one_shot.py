"""Methods that score every layer once, on the whole model, and drop the layers of least score one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from intarsia.architecture.spec import Architecture
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.step import Step


@final
class OneShot:
    """Removal in the order of a score; of equal scores the lower layer goes first.

    Attributes:
        protect: how many of the first and of the last original layers are never dropped.
    """

    progressive = False

    def __init__(
        self, score: Callable[[Intermediate], list[float]], *, passes: int, protect: tuple[int, int] = (0, 0)
    ) -> None:
        """
        Args:
            score: one number a layer of the whole model; what is small is dropped first.
            passes: over the calibration set, those of `score` included; 0 where weights suffice.
        """
        self.score = score
        self.passes = passes
        self.measures = passes > 0
        self.protect = protect

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Drop the layer of least score among those left that may go."""
        scores: list[float] = history[0]["scores"] if history else self.score(model)
        first, last = self.protect
        left = [op.sources[0].layer for op in model.ops]
        free = [index for index, layer in enumerate(left) if first <= layer < len(scores) - last]
        if not free:
            return None
        start = min(free, key=lambda index: (scores[left[index]], left[index]))
        evidence: dict[str, Any] = {"dropped": left[start], "score": scores[left[start]]}
        if not history:
            evidence["scores"] = scores
        return Step(start=start, count=1, op=None, evidence=evidence)

    def reason(self) -> str:
        """Why nothing more can be dropped."""
        first, last = self.protect
        return f"this method never drops the first {first} and the last {last} layers, and no others are left"

    def forwards_at_most(
        self, architecture: Architecture, target: int, sequences: int, in_loop: ClosedFormSettings | None
    ) -> int:
        """Those of the score."""
        return self.passes * architecture.n_layers
