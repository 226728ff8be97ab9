"""A planner's decision, and how it is logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from intarsia.architecture.spec import Architecture
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.intermediate import Intermediate
from intarsia.recipe.ops import Concat, Op


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decision: current layers `start` .. `start + count - 1` become `op` (None: they are dropped).

    `evidence` is what it was decided on, as plain data for the run's log. `whole`, where given, is every layer of the
    model after the step: for a planner whose next model is not the one before with a change at one place.
    """

    start: int
    count: int
    op: Op | None
    evidence: Mapping[str, Any]
    whole: Sequence[Op] | None = None

    @property
    def removed(self) -> int:
        """By how much the model becomes shallower."""
        return self.count - (0 if self.op is None else 1)


class Planner(Protocol):
    """A method. It decides one step at a time and changes nothing itself.

    Attributes:
        progressive: whether a decision needs the current model to be measured anew.
        measures: whether the first decision needs the whole model to be measured.
    """

    progressive: bool
    measures: bool

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """The next step towards `target` layers, or None where nothing more is allowed.

        Args:
            history: the evidence of the steps before, in order (also of those done before a restart).
        """

    def reason(self) -> str:
        """Why nothing more is allowed, for the user."""

    def forwards_at_most(
        self, architecture: Architecture, target: int, sequences: int, in_loop: ClosedFormSettings | None
    ) -> int:
        """Layer-forwards over the calibration text from the whole model down to `target` layers, at most.

        Args:
            sequences: how many the calibration text has.
            in_loop: how each step is healed before the next, if it is.
        """


def strides(depth: int, target: int, merge: int) -> Iterator[tuple[int, int]]:
    """The steps from `depth` down to `target` where `merge` layers become one: current depth, and layers merged."""
    while depth > target:
        count = min(merge, depth - target + 1)
        yield depth, count
        depth -= count - 1


def one_attention_type(model: Intermediate, ops: Sequence[Op]) -> bool:
    """Whether all sources of these layers attend in one way (fully, or over a sliding window): others do not merge."""
    types = model.architecture.layer_types
    return types is None or len({types[source.layer] for op in ops for source in op.sources}) == 1


def describe(op: Op) -> Mapping[str, Any]:
    """An op in short, for the log: sources, and how many pieces of each."""
    if isinstance(op, Concat):
        return {str(cut.source): {"kv_groups": len(cut.kv_groups), "channels": len(cut.channels)} for cut in op.cuts}
    return {str(source): "whole" for source in op.sources}


def mlp_pieces(mixture: bool) -> str:
    """What the pieces of an MLP are called."""
    return "experts" if mixture else "channels"


def of_experts(provenance: Mapping[str, Any]) -> bool:
    """Whether a recipe tells that its MLPs are mixtures of experts."""
    return provenance.get("mlp_pieces") == mlp_pieces(True)


def step_line(depth: int, start: int, op: Op | None, loss: float | None, *, mixture: bool) -> str:
    """One step for a person: the depth it leads to, where it was, what is there now, and the calibration loss.

    Args:
        mixture: whether the pieces of an MLP are experts.
    """
    what = "dropped" if op is None else "merged into " + " + ".join(_short(op, mlp_pieces(mixture)))
    return f"{depth} layers: at {start}, {what}" + ("" if loss is None else f", calibration loss {loss:.4f}")


def repaired(evidence: Mapping[str, Any]) -> str:
    """What came of a repair in the loop, as the end of such a line; nothing where there was none."""
    repair = evidence.get("repair")
    if repair is None or repair["held_out_loss"] is None:
        return ""
    before, after = repair["held_out_loss"]
    among = f", best of {len(repair['finalists'])}" if "finalists" in repair else ""
    if "block" in evidence:
        start, stop = evidence["block"]
        among += f": the original without {start} to {stop - 1}"
    return f"{among}, {'repaired' if repair['taken'] else 'not repaired'}: held-out loss {before:.4f} -> {after:.4f}"


def _short(op: Op, mlp: str) -> list[str]:
    if isinstance(op, Concat):
        return [f"{cut.source.layer} ({len(cut.kv_groups)} groups, {len(cut.channels)} {mlp})" for cut in op.cuts]
    return [f"{source.layer} (whole)" for source in op.sources]
