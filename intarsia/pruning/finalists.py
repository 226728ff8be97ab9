"""The finalists of a step: each is healed, and the one of least held-out loss is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from intarsia.building.recipe_layers import Tensors
from intarsia.healing.layer_fit import LayerFit
from intarsia.healing.teacher import TeacherStates
from intarsia.pruning.heal_in_loop import StepHealer, losses_after
from intarsia.pruning.step import Step, describe


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A step, what is fitted if it is taken, and the held-out sequences' summed loss without and with that."""

    step: Step
    output_projections: list[LayerFit]
    fitted: Mapping[int, Tensors]
    before: float
    after: float

    @property
    def taken(self) -> bool:
        return self.after < self.before

    @property
    def loss(self) -> float:
        return min(self.before, self.after)


def settle(healer: StepHealer, steps: Sequence[Step]) -> tuple[Step, dict[str, Any]]:
    """Take the step whose healed model has the least loss on held-out sequences; of equal ones the first.

    Returns:
        The step, and as plain data what `StepHealer.replace` reports, with the loss of each of the others.
    """
    model, rows = healer.model, healer.held_out
    original = model.original()  # held while the whole model is what was measured
    spent = model.layer_forwards
    trials: list[_Trial] = []
    with model.progress.task(f"healing {len(steps)} finalists", len(steps)) as task:
        for step in steps:
            trials.append(_tried(healer, step, original, rows))
            task.advance()
    best = min(trials, key=lambda trial: trial.loss)
    spent = model.layer_forwards - spent
    first, _ = healer.exchange(best.step.start, best.step.count, best.step.op)
    for index, tensors in best.fitted.items() if best.taken else ():
        model.fit(index, tensors)
    model.measure(first)
    tokens = max(int(model.counts_N[rows].sum()), 1)
    return best.step, {
        "output_projections": [asdict(fit) for fit in best.output_projections],
        "taken": best.taken,
        "held_out_loss": [best.before / tokens, best.after / tokens],
        "layer_forwards": spent,
        "finalists": [
            {
                "replaced": [trial.step.start, trial.step.start + trial.step.count],
                "op": None if trial.step.op is None else describe(trial.step.op),
                "held_out_loss": [trial.before / tokens, trial.after / tokens],
            }
            for trial in trials
        ],
    }


def _tried(healer: StepHealer, step: Step, original: TeacherStates, rows: Sequence[int]) -> _Trial:
    """A step, healed and evaluated; the model is as before afterwards."""
    model = healer.model
    was = list(model.ops), list(model.fitted), list(model.modules)
    first, due = healer.exchange(step.start, step.count, step.op)
    before = float(losses_after(model, first, rows).sum())
    unrepaired = {index: model.fitted[index] for index in due}
    fits, _ = healer.fit(first, due, original)
    fitted = {
        index: tensors
        for index in due
        if (tensors := model.fitted[index]) is not None and tensors is not unrepaired[index]
    }
    after = float(losses_after(model, first, rows).sum()) if fitted else before
    model.ops, model.fitted, model.modules = was
    if model.measures:
        model.refresh()  # where a second layer was fitted, those before it were measured anew
    return _Trial(step=step, output_projections=fits, fitted=fitted, before=before, after=after)
