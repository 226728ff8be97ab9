"""What is said of a step of a plan: in its log, and to whoever is watching; and what pieces are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intarsia.recipe.ops import Concat, Op


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
