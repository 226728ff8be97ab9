"""Planners, their steps, and how steps are logged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from intarsia.architecture.spec import Architecture
from intarsia.flags import flag, token_count
from intarsia.healing.settings import Check, Checked, ClosedFormSettings
from intarsia.recipe.algebra import half_layers
from intarsia.recipe.recipe import Concat, Merge, NormMode, Op

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate
    from intarsia.run_dir import Log


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decision: current layers `start` .. `start + count - 1` become `op`."""

    start: int
    count: int
    # None: the layers are dropped.
    op: Op | None
    # The basis of the decision, as plain data for the log.
    evidence: Mapping[str, Any]
    # All layers of the model after the step, if it changes more than one place.
    whole: Sequence[Op] | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """`ops` in place of the `count` layers from `start` on."""

    start: int
    count: int
    ops: tuple[Op, ...]


Criterion: TypeAlias = Literal["loss", "kl"]


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Checked):
    """Settings of methods whose plan also compares blocks."""

    # Calibration tokens for choosing steps, the first ones (default: all).
    plan_tokens: int | None = flag(None, metavar="N", parse=token_count)
    # Also heal the original without each of the N best blocks of adjacent layers, and keep the best result.
    blocks: int = 0
    # Compare candidates and blocks by their loss, or by KL(original || candidate) of the next token.
    criterion: Criterion = "loss"

    def checks(self) -> Iterator[Check]:
        yield from self.at_least(1, "plan_tokens")
        yield from self.at_least(0, "blocks")


@dataclass(frozen=True, kw_only=True)
class ProgressiveSettings(PlanSettings):
    """Settings of all methods that measure the model after each step."""

    # Heal the layers that a step changes in closed form before choosing the next step.
    heal_in_loop: bool = False


class Planner:
    """A method. It decides one step at a time and changes nothing itself.

    Register it with `@planner(NAME)` in a file of its own; `__init__` gets its settings, if it has any.
    """

    # Whether each decision needs measures of the current model.
    progressive = False
    # Whether the first decision needs measures of the whole model.
    measures = True
    # Whether the last layer's influence is measured after the final norm.
    after_final_norm = False
    # Whether it needs to join layers or pieces.
    joins = False
    # Most layers that a step merges into one. With more than two, the last step depends on the target.
    layers_at_once = 2
    # Number of blocks without which the final heal also starts, and tokens for choosing steps and blocks (None:
    # all).
    blocks = 0
    plan_tokens: int | None = None
    # Number of models of the target depth from which the final heal starts (see `other_finalists`).
    finalists = 1
    # Measure by which candidates and blocks are compared.
    criterion: Criterion = "loss"
    # How changed layers are healed before the next step; for progressive methods.
    in_loop: ClosedFormSettings | None = None
    # Log for the measurements of a long decision, which a restart reads.
    journal: Log | None = None

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """The next step towards `target` layers; None if none is allowed.

        Args:
            history: the evidence of all earlier steps in order, also those before a restart.
        """
        raise NotImplementedError

    def reason(self) -> str:
        """Why no further step is allowed, for the user."""
        return "no layer is left"

    def other_finalists(
        self, evidence: Mapping[str, Any], whole: Sequence[Op], architecture: Architecture
    ) -> Mapping[str, Sequence[Op]]:
        """Other models of the step's depth from which the final heal also starts, by name.

        Args:
            evidence: that of the step.
            whole: the original's layers.
        """
        return {}

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> float:
        """Layer-forwards over the calibration text from the whole model down to `target` layers, at most.

        Args:
            sequences: number of sequences for choosing steps.
        """
        return architecture.n_layers if self.measures else 0


class Progressive(Planner):
    """A method that measures the model after every step, and can have each step healed."""

    progressive = True

    def __init__(self, settings: ProgressiveSettings) -> None:
        self.in_loop = ClosedFormSettings() if settings.heal_in_loop else None
        self.blocks, self.plan_tokens, self.criterion = settings.blocks, settings.plan_tokens, settings.criterion

    def heal_forwards(self, architecture: Architecture, current: int) -> int:
        """Layer-forwards that healing one step of a model of `current` layers takes at most: fits of two layers, one
        measurement of the model and two of the held-out loss."""
        from intarsia.healing.layer_fit import passes

        if self.in_loop is None:
            return 0
        fit, held_out = passes(architecture, self.in_loop.changed), math.ceil(current / self.in_loop.held_out)
        return 2 * fit + current + 2 * held_out


def strides(depth: int, target: int, merge: int) -> Iterator[tuple[int, int]]:
    """The steps from `depth` down to `target`, merging `merge` layers each: current depth, and layers merged."""
    while depth > target:
        count = min(merge, depth - target + 1)
        yield depth, count
        depth -= count - 1


def one_attention_type(model: Intermediate, ops: Sequence[Op]) -> bool:
    """Whether all sources of these layers have one type of attention (full or sliding window), as merging requires."""
    types = model.architecture.layer_types
    return types is None or len({types[source.layer] for op in ops for source in op.sources}) == 1


def without_half_layers(model: Intermediate, start: int, count: int, norm: NormMode = "fold") -> Op | None:
    """The attention of the first with the MLP of the last of `count` layers; everything between is dropped.

    Returns:
        None if the two layers are not pieces of original ones, differ in attention type, or can only be removed.
    """
    if model.architecture.removal_only:
        return None
    first, last = model.ops[start], model.ops[start + count - 1]
    modes = {op.norm for op in (first, last) if isinstance(op, Concat)}
    if isinstance(first, Merge) or isinstance(last, Merge) or modes - {norm}:
        return None
    return half_layers(first, last, norm, model.architecture) if one_attention_type(model, [first, last]) else None


def describe(op: Op) -> Mapping[str, Any]:
    """An op in short, for the log: sources, and how many pieces of each."""
    if isinstance(op, Concat):
        return {str(cut.source): {"kv_groups": len(cut.kv_groups), "channels": len(cut.channels)} for cut in op.cuts}
    return {str(source): "whole" for source in op.sources}


def mlp_pieces(mixture: bool) -> str:
    """The name of the pieces of an MLP."""
    return "experts" if mixture else "channels"


def of_experts(provenance: Mapping[str, Any]) -> bool:
    """Whether the recipe's MLPs are mixtures of experts, by its provenance."""
    return provenance.get("mlp_pieces") == mlp_pieces(True)


def step_words(entry: Mapping[str, Any], mlp: str) -> str:
    """A logged step in words; `mlp` is the name of the pieces of an MLP."""
    op = entry["op"]
    if op is None:
        layers = re.sub(r"[\w.-]+:", "", str(entry["evidence"].get("dropped", "")))  # without the names of variants
        return f"{layers} dropped".strip()
    if list(op.values()) == ["whole"]:
        return f"only {next(iter(op)).partition(':')[2]} kept, whole"
    return "joined from " + " + ".join(
        f"{name.partition(':')[2] or name}"
        + (f" (KV groups {part['kv_groups']}, {mlp} {part['channels']})" if isinstance(part, Mapping) else f" ({part})")
        for name, part in op.items()
    )


def step_line(entry: Mapping[str, Any], mlp: str) -> str:
    """The log line of a step: its depth, result and losses."""
    line = f"{entry['layers']} layers: {step_words(entry, mlp)}"
    if entry["loss"] is not None:
        line += f", calibration loss {entry['loss']:.4f}"
    heal = entry["evidence"].get("heal")
    if heal is None or heal["held_out_loss"] is None:
        return line
    before, after = heal["held_out_loss"]
    return f"{line}, {'healed' if heal['taken'] else 'not healed'}: held-out loss {before:.4f} -> {after:.4f}"


class OneShot(Planner):
    """Removal in the order of a score; of equal scores the lower layer first."""

    # Passes over the calibration text for `score`, including the one that measures the model; 0: none.
    passes = 1
    # Number of first and of last original layers that are never dropped.
    protect = (0, 0)
    # The name of the scores in the log.
    scored = "scores"

    @property
    def measures(self) -> bool:  # type: ignore[override]
        """Whether the whole model is measured first."""
        return self.passes > 0

    def score(self, model: Intermediate) -> list[float]:
        """One number per layer of the whole model; the smallest is dropped first."""
        raise NotImplementedError

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step | None:
        """Drop the remaining layer of least score that may be dropped."""
        scores: list[float] = history[0][self.scored] if history else self.score(model)
        first, last = self.protect
        left = [op.sources[0].layer for op in model.ops]
        inner = [index for index, layer in enumerate(left) if first <= layer < len(scores) - last]
        free = [index for index in inner if model.may_drop(index)]
        if not free:
            return None
        start = min(free, key=lambda index: (scores[left[index]], left[index]))
        evidence: dict[str, Any] = {"dropped": left[start], "score": scores[left[start]]}
        if not history:
            evidence[self.scored] = scores
        return Step(start=start, count=1, op=None, evidence=evidence)

    def reason(self) -> str:
        first, last = self.protect
        return f"this method never drops the first {first} and the last {last} layers, and no others are left"

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> int:
        """Layer-forwards of the score."""
        return self.passes * architecture.n_layers
