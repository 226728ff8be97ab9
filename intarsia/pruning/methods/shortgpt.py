"""ShortGPT: remove the layers of least block influence, measured once on the whole model.

Source: Men et al., arXiv 2403.03853. No deviation: influence is measured on the residual stream, over all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.architecture.spec import Architecture
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.step import Step


class ShortGpt:
    """One-shot removal by block influence."""

    progressive = False
    measures = True

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Drop the layer of least influence among those left."""
        influences = history[0]["influence"] if history else [measure.influence for measure in model.measures]
        left = [op.sources[0].layer for op in model.ops]
        start = min(range(len(left)), key=lambda index: (influences[left[index]], left[index]))
        evidence: dict[str, Any] = {"dropped": left[start]}
        if not history:
            evidence["influence"] = influences
        return Step(start=start, count=1, op=None, evidence=evidence)

    def reason(self) -> str:
        """Never asked: a layer can always be dropped."""
        return "no layer is left"

    def forwards_at_most(
        self, architecture: Architecture, target: int, sequences: int, in_loop: ClosedFormSettings | None
    ) -> int:
        """One pass over the whole model."""
        return architecture.n_layers
