"""An estimate of a plan's cost: parameters, weights, hidden states, passes over the text, and disk.

Sizes follow from the config. Passes are an upper bound: a change re-runs only the layers after it, and its place is not
known in advance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from intarsia.pruning.race import share_at_most
from intarsia.pruning.step import Planner

if TYPE_CHECKING:
    import torch

    from intarsia.checkpoint.reader import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a plan, as `--dry-run` prints it."""

    # Parameters of the model before and after.
    parameters_before: int
    parameters_after: int
    # Bytes of all weights in the dtype of the run.
    weight_bytes: int
    # Bytes of the calibration text's hidden states at all kept depths.
    hidden_bytes: int
    # Tokens of text.
    tokens: int
    # Passes of the whole model over the calibration text, for planning and for the closed form after it.
    passes_at_most: float
    # Of the passes for planning, those that compare blocks: they are taken when a recipe is healed.
    block_passes_at_most: float = 0.0
    heal_passes_at_most: float = 0.0
    # Bytes of the new weights on disk.
    disk_bytes: int

    def words(self) -> str:
        """One line, for the log."""
        heal = f" and {self.heal_passes_at_most:.1f} to heal" if self.heal_passes_at_most else ""
        return (
            f"estimate: at most {self.passes_at_most:.1f} passes over {self.tokens:,} tokens of text{heal}; "
            f"weights {self.weight_bytes / 1e9:.2f} GB, hidden states {self.hidden_bytes / 1e9:.2f} GB, "
            f"on disk {self.disk_bytes / 1e9:.2f} GB"
        )


def blocks_raced(starts: int, kept: int) -> int:
    """The number of whole-layer blocks to race, to keep `kept`: those of least angular distance."""
    return min(starts, max(kept, math.ceil(starts / 2)))


def estimate(
    checkpoint: Checkpoint,
    planner: Planner,
    target: int,
    *,
    tokens: int,
    measured: int,
    seq_len: int,
    dtype: torch.dtype,
) -> Estimate:
    """The cost of planning down to `target` layers.

    Args:
        measured: tokens of the text on which the original is measured.
        dtype: of the run.
    """
    from intarsia.activations.architecture_checks import state_of

    architecture = checkpoint.architecture
    depth, parameters = architecture.n_layers, checkpoint.parameters
    after = parameters - (depth - target) * architecture.layer_parameters
    # Shares of the text on which the original and later models are measured. Blocks and healing in the loop keep the
    # original's hidden states beside those of the model.
    whole, share = measured / tokens, min(1.0, (planner.plan_tokens or tokens) / tokens)
    kept_whole = bool(planner.measures or planner.progressive or planner.blocks)
    kept = (depth + 1) * (whole * kept_whole + share * bool(planner.in_loop or planner.blocks))
    rows = max(int(share * tokens) // seq_len, 1)
    forwards = planner.forwards_at_most(architecture, target, rows)
    first, blocks = min(depth, forwards), 0.0
    if planner.blocks:
        # Blocks of whole layers, then the best of them and their two shifts by half a layer.
        number = blocks_raced(target + 1, planner.blocks)
        raced = share_at_most(number, rows, racing=True, keep=planner.blocks)
        blocks = raced * sum(range(target + 1 - number, target + 1)) + 3 * min(planner.blocks, number) * target
    return Estimate(
        parameters_before=parameters,
        parameters_after=after,
        weight_bytes=parameters * dtype.itemsize,
        tokens=tokens,
        hidden_bytes=int(kept * tokens * state_of(architecture).size * dtype.itemsize),
        passes_at_most=(first * whole + (forwards - first + blocks) * share) / depth,
        block_passes_at_most=blocks * share / depth,
        disk_bytes=after * checkpoint.dtype.itemsize,
    )
